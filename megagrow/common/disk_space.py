"""Whether a disk has room, asked before anything is written."""

import shutil
from pathlib import Path

from megagrow.common.sizes import format_bytes
from megagrow.errors import ResourceError


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
