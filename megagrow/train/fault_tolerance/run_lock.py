"""One run at a time in a directory: a second start must not write over what the first writes."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

from megagrow.errors import ResourceError

PATIENCE = 100.0
"""Seconds to wait for the run before: one that was told to stop is saving (launchers give it 30 s),
and a file server keeps the lock of a host that is gone for a while (NFSv4: 90 s)."""
POLL = 0.2
NAME = "lock"


def lock_directory(
    directory: Path, rank: int, say: Callable[[str], None]
) -> AbstractContextManager[object]:
    """The lock of a run's directory, on rank 0; the other ranks need none.

    It is created if it is missing. Raises InputError if another process still trains there after
    PATIENCE, OSError if the directory cannot be written to.
    """
    return DirectoryLock(directory, say) if rank == 0 else nullcontext()


class DirectoryLock:
    """A context in which no other process has the lock of a directory.

    It is a POSIX record lock on the file `lock`: it goes with the process, however that ends, is
    not inherited by processes that it starts, and holds between hosts where the file system has
    locks.
    """

    def __init__(self, directory: Path, say: Callable[[str], None]) -> None:
        """Takes it, or waits for it. Raises InputError if another process still has it then."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / NAME
        self._file: IO[str] = self._path.open("a+", encoding="utf-8")
        try:
            self._take(say)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _take(self, say: Callable[[str], None]) -> None:
        until, told = time.monotonic() + PATIENCE, False
        while not self._try(say):
            owner = self._owner()
            if time.monotonic() > until:
                raise ResourceError(
                    f"{self._path.parent}: {owner} trains this run; wait until it has ended, or "
                    f"choose another output_dir. If that host is gone for good, remove {self._path}"
                )
            if not told:
                say(f"{self._path.parent}: {owner} still trains this run; waiting for its end")
                told = True
            time.sleep(POLL)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def _try(self, say: Callable[[str], None]) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            say(
                f"warning: {self._path.parent}: no locks on this file system "
                f"({error.strerror}): a second start of this run would not be noticed"
            )
        return True

    def _owner(self) -> str:
        """Who holds it, in its own words."""
        self._file.seek(0)
        return self._file.read(200).strip() or "another process"
