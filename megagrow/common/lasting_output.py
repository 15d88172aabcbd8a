"""Standard streams that outlast their reader: a failed write redirects them to a file.

Without it, `megagrow train RUN.yaml | head` would end the run at the first line after `head` has
ended. The same happens if stdout is a file on a full disk, or a terminal that is gone.
"""

import io
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megagrow.common.atomic_files import make_folder
from megagrow.errors import InputError


def log_file(directory: Path, rank: int) -> Path:
    """Return the file that replaces the standard streams of a rank: `train.log` of rank 0,
    `train-rank-NNNNN.log` of the others."""
    return directory / ("train.log" if rank == 0 else f"train-rank-{rank:05d}.log")


def make_output_last(fallback: Path) -> None:
    """Redirect stdout or stderr to the end of the file `fallback` when a write to it fails.

    The failed output is written there too, after one line with the cause. Nothing is lost or raised
    unless that file cannot be written either; then output is dropped. The redirection includes
    output of libraries and child processes. It holds until the process ends.
    """
    sys.stdout = _lasting(sys.stdout, "standard output", fallback)
    sys.stderr = _lasting(sys.stderr, "standard error", fallback)


@contextmanager
def lasting_output(fallback: Path) -> Iterator[None]:
    """`make_output_last` within a context, for callers that own the process."""
    before = sys.stdout, sys.stderr
    make_output_last(fallback)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # a process without a console
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO, name: str, fallback: Path) -> TextIO:
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError):  # no file of the operating system, such as a notebook's
        return stream
    raw = _LastingFile(stream, descriptor, name, fallback)
    try:
        stream.flush()
    except OSError as error:
        raw.redirect(error)
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", True),
    )


class _LastingFile(io.RawIOBase):
    """Open file that is replaced by a fallback when a write fails."""

    def __init__(self, stream: TextIO, descriptor: int, name: str, fallback: Path) -> None:
        self._stream = stream  # closes the descriptor when nothing refers to it
        self._descriptor, self._fallback = descriptor, fallback
        self.name = name
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write some of the data; return the number of bytes written or dropped."""
        with self._lock:
            try:
                return self._write(data)
            except OSError as error:
                self.redirect(error)
            try:
                return self._write(data)
            except OSError:
                return len(data)

    def redirect(self, error: OSError) -> None:
        """Let the descriptor refer to the fallback, if that can be opened."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{now} | warning: {self.name} failed ({error.strerror}); it continues here\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        try:
            make_folder(self._fallback.parent)
            file = os.open(self._fallback, flags, 0o666)
            try:
                os.dup2(file, self._descriptor)
                os.write(file, line.encode())
            finally:
                os.close(file)
        except (OSError, InputError):
            return

    def _write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another process has made a shared pipe non-blocking
                select.select([], [self._descriptor], [])
