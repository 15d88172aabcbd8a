"""Checks that names from untrusted files stay inside their folder."""

LONGEST_NAME = 255
"""Bytes, on every file system that is in use."""


def is_plain_name(name: object) -> bool:
    """Whether it can only be a file directly in a folder: no path, no `..`, nothing invisible."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and "/" not in name
        and len(name.encode(errors="replace")) <= LONGEST_NAME
    )


def is_inner_path(path: object) -> bool:
    """Whether it can only be a file in a folder or in folders below it."""
    return isinstance(path, str) and all(map(is_plain_name, path.split("/")))
