"""Validation of file names from untrusted files: they must not refer to files outside a folder."""

from pathlib import Path

from megagrow.common.json_text import read_limited
from megagrow.errors import CheckpointError

LONGEST_NAME = 255
"""Bytes; the limit of common file systems."""


def is_plain_name(name: object) -> bool:
    """Return True if a value can only name a file directly in a folder.

    Paths, `..` and unprintable characters are rejected.
    """
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and "/" not in name
        and len(name.encode(errors="replace")) <= LONGEST_NAME
    )


def is_inner_path(path: object) -> bool:
    """Return True if a value can only name a file in a folder or in its subfolders."""
    return isinstance(path, str) and all(map(is_plain_name, path.split("/")))


def read_name(path: Path) -> str:
    """Return the name in a file such as `latest`, without surrounding blanks.

    Raises CheckpointError if the file cannot be read or contains anything but a plain name.
    """
    try:
        name = read_limited(path, 2 * LONGEST_NAME, CheckpointError).decode("utf-8").strip()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    if not is_plain_name(name):
        raise CheckpointError(f"{path}: {name!r:.100} is not the name of a folder next to it")
    return name
