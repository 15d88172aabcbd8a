"""Progress of a run: a live line on rank 0's terminal, or log lines where there is no terminal.

Both show the same fixed fields:
`step 1200 | loss 2.841 | grad norm 0.83 | lr 1.2e-4 | 41.2k tok/s | MFU 46.1% | ETA 3h12m`.
A field without a value shows `-`.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from megagrow.common.sizes import format_duration, format_short

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 60.0
"""Window of the pace that the ETA assumes: long enough to be steady, short enough to follow a
growth."""
ESTIMATE_AFTER = 10.0
"""Seconds of training after which the estimated end of the run is logged."""
BAR_WIDTH = 4
"""Smallest width of the live line's progress bar, in characters."""
DROPPED = ("stage", "grad norm", "lr")
"""Fields that the live line omits on narrow terminals, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Values shown after a step."""

    stage: int
    """Counted from 0."""
    stages: int
    step: int
    """Steps done since the start of the run."""
    loss: float
    grad_norm: float | None
    lr: float
    tokens_per_second: float
    flops: float
    """FLOPs of the stages since the start of the run (`flops_true` - `growth_flops_true`)."""
    mfu: float | None = None


class Eta:
    """Time to the end of the run: remaining FLOPs divided by the recent FLOP/s.

    Steps of different stages differ in cost, so steps per second would mislead. Pauses within the
    window (checkpoints, validation) count, because more of them follow.
    """

    def __init__(self, total_flops: float, window: float = WINDOW_SECONDS) -> None:
        self._total = total_flops
        self._window = window
        self._seen: deque[tuple[float, float]] = deque()

    def seconds(self, now: float, flops: float) -> float | None:
        """Return the seconds left when `flops` are done at time `now`; None before the second
        measurement."""
        self._seen.append((now, flops))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()
        then, before = self._seen[0]
        if flops <= before or now <= then:
            return None
        return max(0.0, self._total - flops) * (now - then) / (flops - before)


class LiveLine:
    """Progress display; a context manager that restores the terminal even after an error.

    Args:
        total_steps: steps of the run from its start.
        total_flops: FLOPs of the run (`flops.run_flops`), for the ETA.
        console: the console that the log records are printed to.
        enabled: False on all ranks but 0: nothing is shown.
        every_seconds: time between two log lines where the console is not a terminal.
    """

    def __init__(
        self,
        total_steps: int,
        total_flops: float,
        console: Console,
        enabled: bool = True,
        *,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._eta = Eta(total_flops)
        self._console = console
        self._enabled = enabled
        self._every = every_seconds
        self._clock = clock
        self._next_line = clock()
        self._first_update: float | None = None
        self._progress = _progress(console, enabled and console.is_terminal)
        self._task = self._progress.add_task("starting", total=total_steps)

    def plan(self, total_steps: int, total_flops: float) -> None:
        """Set the totals of the run; they depend on the checkpoint that it resumes from."""
        self._total_steps, self._eta = total_steps, Eta(total_flops)
        self._progress.update(self._task, total=total_steps)

    def update(self, status: Status) -> None:
        """Show the state after a step."""
        now = self._clock()
        left = self._eta.seconds(now, status.flops)
        self._estimate_end(now, left)
        fields = _fields(status, left)
        if self._console.is_terminal:
            text = _fit(fields, self._console.width - BAR_WIDTH - 1)
            self._progress.update(self._task, completed=status.step, description=text)
        elif self._enabled and (now >= self._next_line or status.step == self._total_steps):
            self._next_line = now + self._every
            logger.info(" | ".join(text for name, text in fields.items() if name != "stage"))

    def _estimate_end(self, now: float, left: float | None) -> None:
        """Log the estimated end once, when the pace is known."""
        first = self._first_update = now if self._first_update is None else self._first_update
        if self._enabled and left is not None and now - first >= ESTIMATE_AFTER:
            self._first_update = math.inf
            end = datetime.now().astimezone() + timedelta(seconds=left)
            logger.info(
                "estimated end %s | %s left", f"{end:%Y-%m-%d %H:%M}", format_duration(left)
            )

    def __enter__(self) -> "LiveLine":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def scientific(number: float) -> str:
    """`0.00012` -> `1.2e-4`."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _fields(status: Status, seconds_left: float | None) -> dict[str, str]:
    """Return the fields of the progress line in order, by name."""
    norm = "-" if status.grad_norm is None else f"{status.grad_norm:.3g}"
    return {
        "stage": f"stage {status.stage + 1}/{status.stages}",
        "step": f"step {status.step}",
        "loss": f"loss {status.loss:.3f}",
        "grad norm": f"grad norm {norm}",
        "lr": f"lr {scientific(status.lr)}",
        "throughput": f"{format_short(status.tokens_per_second)} tok/s",
        "MFU": f"MFU {'-' if status.mfu is None else f'{status.mfu:.1%}'}",
        "ETA": f"ETA {format_duration(seconds_left)}",
    }


def _fit(fields: dict[str, str], width: int) -> str:
    """Join the fields, without the first few of `DROPPED` if they do not fit in `width`."""
    for count in range(len(DROPPED) + 1):
        line = " | ".join(fields[name] for name in fields if name not in DROPPED[:count])
        if len(line) <= width:
            break
    return line


def _progress(console: Console, enabled: bool) -> Progress:
    """Build the live line; the bar fills the remaining width."""
    bar = Column(ratio=1, min_width=BAR_WIDTH)
    return Progress(
        BarColumn(bar_width=None, table_column=bar),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
        disable=not enabled,
    )
