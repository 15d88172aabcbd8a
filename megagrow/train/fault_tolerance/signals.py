"""Leaving cleanly: SIGTERM, SIGINT and SIGUSR1 end the run after the step in progress.

SIGUSR1 is how SLURM warns of the end of a job's time (`--signal=USR1@120`).
"""

import signal
import time
from types import FrameType
from typing import Any

SAME_REQUEST_SECONDS = 2.0
"""Ctrl-C reaches a rank from the terminal, and again, as either signal, from its launcher: what
comes this soon after the first signal is no second wish."""


class StopRequested(Exception):
    """A signal came while the run did something else than plain steps; on all ranks."""


class StopSignal:
    """A context in which SIGTERM, SIGINT and SIGUSR1 only raise a flag.

    One more SIGTERM or SIGINT interrupts at once; but not after SIGUSR1, which is a warning: the
    end of a job's time comes with SIGTERM, and finds a checkpoint being written at worst.
    """

    def __init__(self) -> None:
        self.received: str | None = None
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
        elif signal.SIGUSR1.name in (self.received, signal.Signals(number).name):
            return
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
