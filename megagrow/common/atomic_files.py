"""Atomic creation of files and folders: write under a temporary name, fsync, rename.

A crash or a kill leaves either the old version or the new one under the final name. A folder that
replaces another one takes two renames: between them, the old version is `replaced_path` and the new
one still has its temporary name. Symbolic links are replaced or removed, never followed.
"""

import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO

from megagrow.common.log_setup import warn_once
from megagrow.common.sizes import format_bytes
from megagrow.errors import ConfigError, ResourceError, unwritable

logger = logging.getLogger(__name__)

_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF)
"""Errors of file systems that cannot sync a directory."""


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk (fsync).

    A file system that cannot sync directories causes one warning. Raises OSError, with the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (error.errno in _REFUSED and path.is_dir()):
            raise OSError(error.errno, error.strerror, str(path)) from error
        warn_once(
            logger,
            "sync",
            f"{path}: the file system does not sync directories ({error.strerror}); after a power "
            "failure, new files may be missing",
        )


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file, unique per process: `NAME.PID.partial`."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def publish(partial: Path, path: Path) -> None:
    """Sync a file or a folder, rename it from `partial` to `path`, and sync the parent directory.

    An existing file, folder or link is replaced. The files in a folder must already be synced.
    """
    if partial.is_dir():
        for folder in (path for path in partial.rglob("*") if path.is_dir()):
            sync(folder)
    sync(partial)
    replaced = replaced_path(path) if partial.is_dir() and os.path.lexists(path) else None
    if replaced is not None:
        if os.path.lexists(replaced):  # left by a crash after the second rename
            replaced.rename(free_staging(path, ".removed"))
        path.rename(replaced)
    partial.replace(path)
    sync(path.parent)
    if replaced is not None:
        with suppress(OSError):
            discard(replaced, path)


def replaced_path(path: Path) -> Path:
    """Return the name of a folder between the two renames that replace it: `NAME.old.tmp`."""
    return path.with_name(f"{path.name}.old.tmp")


def discard(path: Path, name: Path) -> None:
    """Remove a file, folder or link after renaming it to `NAME.removed.tmp`. Raises OSError."""
    doomed = free_staging(name, ".removed")
    path.rename(doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, but not the link's target. Raises OSError.

    It may be missing: another process may remove the same path.
    """
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def free_staging(path: Path, suffix: str = "") -> Path:
    """Return the first unused temporary name: `NAME.tmp`, `NAME.1.tmp`, `NAME.2.tmp` ..."""
    numbers = chain([""], (f".{number}" for number in count(1)))
    return first_free(path.with_name(f"{path.name}{suffix}{number}.tmp") for number in numbers)


def first_free(paths: Iterable[Path]) -> Path:
    """Return the first path at which there is no file, folder or link."""
    return next(path for path in paths if not os.path.lexists(path))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the temporary path to write to; publish it as `path` on success, remove it otherwise.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    partial = partial_path(path)
    partial.unlink(missing_ok=True)  # left by a killed process with the same id, or a link
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


def open_in_place(path: Path) -> IO[str]:
    """Open a UTF-8 text file for reading and appending; create it if it is missing.

    Raises ResourceError for a link or anything else that is not a regular file, and OSError.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    irregular = f"{path}: must be a regular file, not a link, a folder or a device; remove it"
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ResourceError(irregular) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ResourceError(irregular)
    return os.fdopen(descriptor, "a+", encoding="utf-8")


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless it exists; it may be a link to a folder.

    Raises ResourceError for a link without target and for a file, and OSError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if path.is_symlink():
            cause = f"is a link to {os.readlink(path)}, which is not a folder; create that folder"
        else:
            cause = "is not a folder; remove it"
        raise ResourceError(f"{path}: {cause}, or choose another path") from error


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
