"""Atomic creation of files and folders: write under a temporary name, fsync, rename.

A crash or a kill leaves either the old version or the new one under the final name. A folder that
replaces another one takes two renames: between them, both have temporary names.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagrow.common.sizes import format_bytes
from megagrow.errors import ConfigError, ResourceError, unwritable


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file, unique per process: `NAME.PID.partial`."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def publish(partial: Path, path: Path) -> None:
    """Sync a file or a folder, rename it from `partial` to `path`, and sync the parent directory.

    An existing file or folder is replaced. The files in a folder must already be synced.
    """
    is_folder = partial.is_dir()
    if is_folder:
        for folder in (path for path in partial.rglob("*") if path.is_dir()):
            sync(folder)
    sync(partial)
    replaced = path.with_name(f"{path.name}.old.tmp")
    if is_folder and path.is_dir():
        path.rename(replaced)
    partial.replace(path)
    sync(path.parent)
    if is_folder:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the temporary path to write to; publish it as `path` on success, remove it otherwise.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    partial = partial_path(path)
    try:
        yield partial
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_synced(path: Path, text: str) -> None:
    """Write a UTF-8 text file into an unpublished folder and sync it. Raises OSError."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def staging_folder(path: Path) -> Path:
    """Return the temporary name of a folder, the same for every process: `NAME.tmp`."""
    return path.with_name(f"{path.name}.tmp")


@contextmanager
def atomic_folder(out: Path, needed: int) -> Iterator[Path]:
    """Yield the temporary folder to write to; publish it as `out` on success, remove it otherwise.

    Args:
        out: final path; its parents are created.
        needed: bytes to be written.

    Raises:
        ConfigError: `out` or the temporary folder of a killed process exists.
        ResourceError: the disk is full, or a file cannot be written.
    """
    partial = staging_folder(out)
    for path in (out, partial):
        if path.exists():
            raise ConfigError(f"{path}: already exists; remove it or choose another path")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out.parent, needed)
        partial.mkdir()
        try:
            yield partial
            publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise unwritable(out, error) from error


def check_room(folder: Path, needed: int) -> None:
    """Raise ResourceError if the disk of a folder has fewer than `needed` free bytes.

    The folder need not exist yet.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            f"{folder}: not enough disk space: {format_bytes(free)} free, "
            f"{format_bytes(needed)} required; free the disk or choose another path"
        )
