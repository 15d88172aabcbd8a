"""Lock of a directory: two processes must not write the same run or the same corpus."""

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

from megagrow.common.atomic_files import make_folder, open_in_place
from megagrow.errors import ResourceError

logger = logging.getLogger(__name__)

PATIENCE = 100.0
"""Seconds to wait for the previous owner. A run that is stopping saves a checkpoint first
(launchers grant 30 s). A file server keeps the lock of a lost host for a while (NFSv4: 90 s)."""
POLL = 0.2
NAME = "lock"


def lock_directory(directory: Path, rank: int) -> AbstractContextManager[object]:
    """Lock a run's directory on rank 0; the other ranks need no lock.

    The directory is created if it is missing. Raises ResourceError if another process still holds
    the lock after PATIENCE, OSError if the directory is not writable.
    """
    return DirectoryLock(directory) if rank == 0 else nullcontext()


class DirectoryLock:
    """Exclusive lock of a directory; a context manager.

    It is a POSIX record lock on the file `lock`. The operating system releases it when the process
    ends for any reason, child processes do not inherit it, and it holds between hosts if the file
    system supports locks.
    """

    def __init__(
        self,
        directory: Path,
        use: str = "trains this run",
        option: str = "output_dir",
        temporary: bool = False,
    ) -> None:
        """Acquire the lock, waiting up to PATIENCE. Raises ResourceError if it stays taken.

        Args:
            use: activity of the owner, for messages.
            option: option that sets the directory, for messages.
            temporary: remove the file `lock` on release.
        """
        make_folder(directory)
        self._path = directory / NAME
        self._use, self._option, self._temporary = use, option, temporary
        self._file: IO[str] = open_in_place(self._path)
        try:
            self._acquire()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _acquire(self) -> None:
        until, logged = time.monotonic() + PATIENCE, False
        while not self._try():
            owner = self._owner()
            if time.monotonic() > until:
                raise ResourceError(
                    f"{self._path.parent}: {owner} {self._use}; wait until it has ended, or "
                    f"choose another {self._option}. If that host is gone for good, remove "
                    f"{self._path}"
                )
            if not logged:
                logger.info(
                    "%s: %s still %s; waiting for it to end", self._path.parent, owner, self._use
                )
                logged = True
            time.sleep(POLL)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            logger.warning(
                "%s: this file system has no locks (%s); a second start is not detected",
                self._path.parent,
                error.strerror,
            )
        return self._is_current() or self._try()

    def _is_current(self) -> bool:
        """Return True if the locked file still has its name; if the previous owner removed it,
        open its successor and return False."""
        try:
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return True
        except FileNotFoundError:
            pass
        self._file.close()
        self._file = open_in_place(self._path)
        return False

    def _owner(self) -> str:
        """Return the owner's process and host, as recorded in the lock file."""
        self._file.seek(0)
        return self._file.read(200).strip() or "another process"
