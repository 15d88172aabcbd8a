"""Leaving cleanly: SIGTERM and SIGINT end the run after the step in progress."""

import signal
import time
from types import FrameType
from typing import Any

SAME_REQUEST_SECONDS = 2.0
"""Ctrl-C reaches a rank from the terminal, and again, as either signal, from its launcher: what
comes this soon after the first signal is no second wish."""


class StopSignal:
    """A context in which SIGTERM and SIGINT only raise a flag; one more interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            self._since = time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
