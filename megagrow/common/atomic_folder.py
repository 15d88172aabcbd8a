"""A folder that appears when all of it is on the disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagrow.common.file_io import sync
from megagrow.common.sizes import format_bytes
from megagrow.errors import ConfigError, ResourceError, unwritable


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which gets the name `out` at the end; nothing is left of a failure.

    `needed` are the bytes that are to be written. InputError if `out` is there, if a process that
    was killed left its part of it, or if the disk has no room or fails.
    """
    partial = out.with_name(f"{out.name}.tmp")
    for path in (out, partial):
        if path.exists():
            raise ConfigError(f"{path}: is there already; remove it or write elsewhere")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out.parent, needed)
        partial.mkdir()
        try:
            yield partial
            for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
                sync(folder)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(out.parent)
    except OSError as error:
        raise unwritable(out, error) from error


def check_room(folder: Path, needed: int) -> None:
    """InputError if the disk of a folder, which need not be there yet, has less than `needed`
    bytes of room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ResourceError(
            f"{folder}: has {format_bytes(free)} of room, {format_bytes(needed)} are needed; free "
            "the disk or write elsewhere"
        )
