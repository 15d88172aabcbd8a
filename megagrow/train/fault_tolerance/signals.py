"""Graceful stop: SIGTERM, SIGINT and SIGUSR1 end the run after the current step or the next one.

The ranks vote on the next step once a rank has started all work of the current one.

SLURM sends SIGUSR1 shortly before a job's time limit (`--signal=USR1@120`).
"""

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from megagrow.common.log_setup import TIME_FORMAT
from megagrow.common.tables import STDOUT

SAME_REQUEST_SECONDS = 2.0
"""Signals within this time of the first one repeat the same request: Ctrl-C reaches a rank from the
terminal and once more, as SIGINT or SIGTERM, from its launcher."""


class StopRequested(Exception):
    """A signal arrived outside of plain training steps. Raised on all ranks."""


class StopSignal:
    """Record SIGTERM, SIGINT and SIGUSR1 in `received`; a context manager.

    A second SIGTERM or SIGINT interrupts immediately. After SIGUSR1 it does not: SIGUSR1 is a
    warning, and the SIGTERM at the time limit may arrive while a checkpoint is being written.
    """

    def __init__(self, announce: bool = False) -> None:
        """Write a line to stdout when a signal arrives if `announce` is set."""
        self.received: str | None = None
        self._announce = announce
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            self._since = time.monotonic()
            if self._announce:
                _acknowledge(self.received)
        elif signal.SIGUSR1.name in (self.received, signal.Signals(number).name):
            return
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _acknowledge(name: str) -> None:
    """Write a line directly: the handler may have interrupted a write to a buffered stream."""
    text = f"{name} received | stopping after this step, with a checkpoint"
    if name == signal.SIGINT.name:
        text += " | press Ctrl-C again to stop at once"
    if sys.__stdout__ is None:  # closed at the start; a file of the run may have its descriptor
        return
    start = "\n" if os.isatty(STDOUT) else ""  # a terminal shows the live line or ^C before it
    with suppress(OSError):
        os.write(STDOUT, f"{start}{time.strftime(TIME_FORMAT)} | {text}\n".encode())
