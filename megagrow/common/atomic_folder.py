"""A folder that appears when all of it is on the disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagrow.common.disk_space import check_room
from megagrow.common.file_io import sync
from megagrow.errors import ConfigError, unwritable


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
