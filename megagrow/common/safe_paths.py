"""Validation of file names from untrusted files: they must not refer to files outside a folder."""

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
