"""What the guards have seen of the last steps, and when the run has to go back. Pure.

A part of the run's state: a run that is resumed in the middle of trouble decides as it would have.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from megagrow.config.sections import GuardsConfig, LossSpikeConfig


@dataclass(frozen=True)
class Guard:
    """The trouble of the last steps, and the rewinds that were made of it."""

    skipped: int = 0
    """Steps in a row, up to now, that were skipped: loss or gradient were not finite."""
    high: int = 0
    """Steps in a row, up to now, whose loss was that of a spike."""
    losses: tuple[float, ...] = ()
    """The last losses, in nats, by which a spike is told; empty without `guards.loss_spike`."""
    rewinds: int = 0
    """How often in a row the run went back to the same checkpoint, or to earlier ones."""
    rewound_to: int = -1
    """The step of the checkpoint to which it last went back; -1 if it never did."""

    @property
    def troubled(self) -> bool:
        """Whether the last step was a bad one: no state to go back to."""
        return self.skipped > 0 or self.high > 0

    def after_step(self, guards: GuardsConfig, loss: float, skipped: bool) -> "Guard":
        """What is known when a step is done."""
        if skipped:
            return replace(self, skipped=self.skipped + 1)
        spike = guards.loss_spike
        if spike is None:
            return replace(self, skipped=0)
        if _is_high(spike, self.losses, loss):
            return replace(self, skipped=0, high=self.high + 1)
        losses = (*self.losses, loss)[-spike.window :]
        return replace(self, skipped=0, high=0, losses=losses)

    def after_growth(self) -> "Guard":
        """The losses of a grown model are not those of the one before."""
        return replace(self, high=0, losses=())

    def after_rewind(self, earlier: "Guard", step: int) -> "Guard":
        """What is known when the run went back to a checkpoint of a step, which knew `earlier`."""
        rewinds = self.rewinds + 1 if step <= self.rewound_to else 1
        return Guard(losses=earlier.losses, rewinds=rewinds, rewound_to=step)

    def reason_to_rewind(self, guards: GuardsConfig) -> str | None:
        """What has gone on for too long, in words; None if nothing has."""
        if self.skipped >= guards.max_skipped_steps:
            return f"{self.skipped} steps in a row had a loss or a gradient that is not finite"
        if guards.loss_spike is not None and self.high >= guards.loss_spike.patience:
            return f"{self.high} steps in a row had the loss of a spike"
        return None

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Guard":
        """The inverse of `asdict`."""
        return Guard(**values | {"losses": tuple(values.get("losses", ()))})


def _is_high(spike: LossSpikeConfig, losses: tuple[float, ...], loss: float) -> bool:
    if len(losses) < spike.window:
        return False
    deviation = statistics.stdev(losses)
    return math.isfinite(loss) and loss > statistics.fmean(losses) + spike.zscore * deviation
