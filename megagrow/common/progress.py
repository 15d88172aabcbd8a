"""Progress of long operations: log lines of a run, or a live bar of a command on a terminal."""

import logging
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megagrow.common.sizes import format_duration
from megagrow.common.tables import print_lines

SECONDS_BETWEEN_LINES = 5.0

logger = logging.getLogger(__name__)


class PhaseProgress:
    """Log lines of a phase that may take long: `validation | 120 of 489 passes | 12s left`.

    A phase shorter than `SECONDS_BETWEEN_LINES` logs nothing.

    Args:
        label: name of the phase.
        total: number of its parts.
        unit: plural of the parts.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._started = self._last_line = time.monotonic()

    def advance(self, parts: int = 1) -> None:
        """Count finished parts."""
        self._done += parts
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) * (self._total - self._done) / self._done
            count = f"{self._done} of {self._total} {self._unit}"
            logger.info("%s | %s | %s left", self._label, count, format_duration(left))


class WorkProgress:
    """Progress of a command in megabytes, with throughput and time left; a context manager.

    Args:
        console: output.
        label: name of the operation.
        total_bytes: size of the work, None if unknown.
    """

    def __init__(self, console: Console, label: str, total_bytes: int | None) -> None:
        self._console = console
        self._label = label
        self._total = total_bytes
        self._bytes = self._earlier = 0
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total_bytes, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def resume(self, done_bytes: int) -> None:
        """Count work of an earlier process; it is excluded from the throughput."""
        self._earlier += done_bytes
        self.advance(done_bytes)

    def advance(self, done_bytes: int) -> None:
        """Count finished work."""
        self._bytes += done_bytes
        self._bar.update(self._task, completed=self._bytes, status=self._status())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print_lines(self._console, [f"{self._label} {self._status()}{self._left()}"])

    def _throughput(self) -> float:
        """Return bytes per second."""
        return (self._bytes - self._earlier) / max(time.monotonic() - self._started, 1e-9)

    def _status(self) -> str:
        total = f"/{self._total / 1e6:,.1f}" if self._total else ""
        speed = f"{self._throughput() / 1e6:.1f} MB/s"
        return f"{self._bytes / 1e6:,.1f}{total} MB{self._extra()}, {speed}"

    def _extra(self) -> str:
        """Return the text of further counters."""
        return ""

    def _left(self) -> str:
        if not self._total or not self._throughput():
            return ""
        seconds = max(self._total - self._bytes, 0) / self._throughput()
        return f", {format_duration(seconds)} left"


class TokenizingProgress(WorkProgress):
    """Progress in megabytes of input and in tokens."""

    def __init__(self, console: Console, total_bytes: int | None) -> None:
        self._tokens = 0
        super().__init__(console, "tokenizing", total_bytes)

    def resume(self, done_bytes: int, tokens: int = 0) -> None:
        """Count work of an earlier process; it is excluded from the throughput."""
        self._tokens += tokens
        super().resume(done_bytes)

    def advance(self, done_bytes: int, tokens: int = 0) -> None:
        """Count finished work."""
        self._tokens += tokens
        super().advance(done_bytes)

    def _extra(self) -> str:
        return f", {self._tokens / 1e6:,.2f}M tokens"
