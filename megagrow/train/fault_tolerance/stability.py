"""Stability guards: track skipped steps and loss spikes, and decide when to rewind. Pure functions.

The guard is part of the run's state, so a resumed run makes the same decisions.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from megagrow.config.sections import GuardsConfig, LossSpikeConfig


@dataclass(frozen=True)
class Guard:
    """Instabilities of the last steps, and the rewinds that they caused."""

    skipped: int = 0
    """Consecutive skipped steps up to now: loss or gradient were not finite."""
    high: int = 0
    """Consecutive steps up to now whose loss was a spike."""
    losses: tuple[float, ...] = ()
    """Last losses, in nats, from which a spike is detected; empty without `guards.loss_spike`."""
    rewinds: int = 0
    """Consecutive rewinds to the same checkpoint or earlier ones."""
    rewound_to: int = -1
    """Step of the checkpoint of the last rewind; -1 if there was none."""

    @property
    def troubled(self) -> bool:
        """True if the last step was skipped or a spike, so its state is no rewind target."""
        return self.skipped > 0 or self.high > 0

    def after_step(self, guards: GuardsConfig, loss: float, skipped: bool) -> "Guard":
        """Return the guard after a step."""
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
        """Return the guard after a growth, without the losses of the smaller model."""
        return replace(self, high=0, losses=())

    def after_rewind(self, earlier: "Guard", step: int) -> "Guard":
        """Return the guard after a rewind to the checkpoint of `step`, whose guard is `earlier`."""
        rewinds = self.rewinds + 1 if step <= self.rewound_to else 1
        return Guard(losses=earlier.losses, rewinds=rewinds, rewound_to=step)

    def reason_to_rewind(self, guards: GuardsConfig) -> str | None:
        """Return the reason for a rewind, or None if none is due."""
        if self.skipped >= guards.max_skipped_steps:
            return f"{self.skipped} consecutive steps with a non-finite loss or gradient"
        if guards.loss_spike is not None and self.high >= guards.loss_spike.patience:
            return f"{self.high} consecutive steps with a loss spike"
        return None

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Guard":
        """Return the guard that `asdict` turned into `values`."""
        return Guard(**values | {"losses": tuple(values.get("losses", ()))})


def _is_high(spike: LossSpikeConfig, losses: tuple[float, ...], loss: float) -> bool:
    if len(losses) < spike.window:
        return False
    deviation = statistics.stdev(losses)
    return math.isfinite(loss) and loss > statistics.fmean(losses) + spike.zscore * deviation
