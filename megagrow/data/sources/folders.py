"""List the files of a folder source, and the reasons for which others are skipped.

A folder with JSON or Parquet files is a dataset: of its other files only .txt files are read, and
no README or license. In a folder without them, every text file is read.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megagrow.data.sources.file_types import FileType, detect

DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|contributing|changelog)([-_.]|$)", re.I
)
"""Names of text files that are not part of a dataset."""


@dataclass(frozen=True)
class Selection:
    """Patterns of the files of a folder source.

    A pattern is matched against the path of a file relative to the source and of the folders above
    it, and against their names; `*` also matches `/`.
    """

    include: tuple[str, ...] = ()
    """Patterns of files to read; empty: all files."""
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders to skip."""


@dataclass(frozen=True)
class Skipped:
    """A file or folder of a source that is not read."""

    path: str
    reason: str


def list_files(folder: Path, selection: Selection) -> Iterator[Path | Skipped]:
    """Yield the files below a folder, in an order independent of the file system.

    Links are followed. A file or folder that is reached again is skipped.
    """
    status = folder.stat()
    folders = {(status.st_dev, status.st_ino): "the source"}
    files: dict[str, str] = {}
    todo = [_entries(folder, "")]
    while todo:
        relative = next(todo[-1], None)
        if relative is None:
            todo.pop()
            continue
        path = folder / relative
        kind = _kind(path)
        if reason := _reason(relative, kind, selection):
            yield Skipped(relative, reason)
        elif kind == "folder":
            status = path.stat()
            first = folders.setdefault((status.st_dev, status.st_ino), relative)
            if first == relative:
                todo.append(_entries(path, f"{relative}/"))
            else:
                yield Skipped(relative, f"the same folder as {first}")
        else:
            first = files.setdefault(os.path.realpath(path), relative)
            yield path if first == relative else Skipped(relative, f"the same file as {first}")


def choose_files(
    folder: Path, selection: Selection, text_key: str
) -> Iterator[tuple[Path, FileType] | Skipped]:
    """Yield the files of a folder source to read, with their types, and the skipped ones."""
    found: list[tuple[Path, FileType]] = []
    for item in list_files(folder, selection):
        if isinstance(item, Skipped):
            yield item
        else:
            found.append((item, detect(item)))
    is_dataset = not selection.include and any(
        kind.layout != "text" and not _is_metadata(kind, text_key) for _, kind in found
    )
    for path, kind in found:
        reason = kind.problem
        if not reason and _is_metadata(kind, text_key):
            reason = f"a JSON object without the key {text_key!r}"
        elif not reason and is_dataset and kind.layout == "text":
            is_documentation = DOCUMENTATION.match(path.name)
            if kind.suffix != ".txt" or is_documentation:
                reason = "not data, in a folder with data files; use --include to read it"
        yield Skipped(path.relative_to(folder).as_posix(), reason) if reason else (path, kind)


def _entries(folder: Path, prefix: str) -> Iterator[str]:
    return (prefix + name for name in sorted(os.listdir(folder)))


def _kind(path: Path) -> str:
    """Return "file", "folder" or the reason why the path is neither."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "a broken link"
        raise
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "not a regular file"


def _reason(relative: str, kind: str, selection: Selection) -> str:
    """Return the reason to skip a file or folder, "" if there is none."""
    if relative.rpartition("/")[2].startswith("."):
        return "hidden"
    if _matches(relative, selection.exclude):
        return "excluded"
    if kind not in ("file", "folder"):
        return kind
    is_included = kind == "folder" or not selection.include
    return "" if is_included or _matches(relative, selection.include) else "not included"


def _matches(relative: str, patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return False
    parts = relative.split("/")
    names = {*parts, *("/".join(parts[: n + 1]) for n in range(len(parts)))}
    plain = [pattern.removeprefix("./").rstrip("/") for pattern in patterns]
    return any(fnmatchcase(name, pattern) for name in names for pattern in plain)


def _is_metadata(kind: FileType, text_key: str) -> bool:
    """Return True for a .json file of one object that has no text, such as dataset_info.json."""
    if kind.keys is None:
        return False
    return text_key not in kind.keys and text_key.split(".")[0] not in kind.keys
