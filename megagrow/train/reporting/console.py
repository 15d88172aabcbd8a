"""The run as its user sees it: one live line on rank 0's terminal, events above it.

Where the output is not a terminal (a log file, a pipe) a plain line appears every few seconds.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from megagrow.common.sizes import format_duration, format_short

WINDOW_SECONDS = 60.0
"""The pace is that of about the last minute: steady, yet quick to notice a larger model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the line shows after a step."""

    stage: int
    """Counted from 0."""
    stages: int
    step: int
    """Steps done, of the whole run."""
    loss: float
    lr: float
    tokens_per_second: float
    flops: float
    """FLOPs done by the stages, of the whole run (`flops_true` but `growth_flops_true`)."""
    mfu: float | None = None


class Eta:
    """Time to the end of the run: FLOPs left by recent FLOP/s, for stages differ in cost per step.

    Pauses within the window (checkpoints, validation) count, as more of them are to come.
    """

    def __init__(self, total_flops: float, window: float = WINDOW_SECONDS) -> None:
        self._total = total_flops
        self._window = window
        self._seen: deque[tuple[float, float]] = deque()

    def seconds(self, now: float, flops: float) -> float | None:
        """Seconds left when `flops` are done at time `now`; None until there is a pace."""
        self._seen.append((now, flops))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()
        then, before = self._seen[0]
        if flops <= before or now <= then:
            return None
        return max(0.0, self._total - flops) * (now - then) / (flops - before)


class LiveLine:
    """Shows how the run goes; a context manager that gives the terminal back, whatever happens.

    `total_flops` are those of the whole run (`flops.run_flops`), for the ETA. With `enabled` False,
    as on all ranks but 0, it shows nothing.
    """

    def __init__(
        self,
        total_steps: int,
        total_flops: float,
        enabled: bool = True,
        *,
        console: Console | None = None,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._eta = Eta(total_flops)
        self._console = console or Console(quiet=not enabled, highlight=False)
        self._every = every_seconds
        self._clock = clock
        self._next_line = clock()
        self._progress = _progress(self._console, enabled and self._console.is_terminal)
        self._task = self._progress.add_task("", total=total_steps, text="starting", stage="")

    def update(self, status: Status) -> None:
        """Shows the state after a step."""
        now = self._clock()
        left = self._eta.seconds(now, status.flops)
        stage = f"stage {status.stage + 1}/{status.stages}"
        text = f"{status.step}/{self._total_steps} {_describe(status)} ETA {format_duration(left)}"
        self._progress.update(self._task, completed=status.step, text=text, stage=stage)
        due = now >= self._next_line or status.step == self._total_steps
        if due and not self._console.is_terminal:
            self._next_line = now + self._every
            self.say(f"{stage} step {text}")

    def say(self, text: str) -> None:
        """Writes `text` for good, above the live line."""
        self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> "LiveLine":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _describe(status: Status) -> str:
    use = "" if status.mfu is None else f" MFU {status.mfu:.0%}"
    pace = f"{format_short(status.tokens_per_second)} tok/s"
    return f"loss {status.loss:.3f} lr {status.lr:.1e} {pace}{use}"


def _progress(console: Console, enabled: bool) -> Progress:
    """The line, its bar taking the room that the numbers leave."""
    fixed = Column(no_wrap=True)
    bar = Column(ratio=1, min_width=4)
    return Progress(
        TextColumn("{task.fields[stage]}", table_column=fixed),
        BarColumn(bar_width=None, table_column=bar),
        TextColumn("{task.fields[text]}", table_column=fixed),
        console=console,
        expand=True,
        disable=not enabled,
    )
