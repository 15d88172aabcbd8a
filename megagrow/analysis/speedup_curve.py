"""The speedup of growth along the whole curve, and how much it differs between seeds.

At each of a row of loss levels that all the runs share, sp and the saved share are measured as
`speedup` defines them: FLOPs to where a curve gets to the level and stays there, the loss between
two points taken as linear in log FLOPs. Every grown run is set against every run from scratch; the
mean over these pairs is what is told, with their range and their sample standard deviation. Pairs
share runs, so that the deviation describes the seeds and is no standard error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.flop_accounting import Account
from megagrow.analysis.speedup import LossCurve, flops_to_reach

LEVELS = 64
START = 0.06
"""The levels begin below the losses of this first share of each run's FLOPs, a steep fall."""
LossKind = Literal["validation", "training"]


@dataclass(frozen=True, slots=True)
class Level:
    """The speedup at one loss, by every pair of a grown run and one from scratch."""

    loss: float
    speedups: tuple[float, ...]
    """sp of each pair; at least one."""

    @property
    def mean(self) -> float:
        """The mean sp."""
        return fmean(self.speedups)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of sp over the pairs, None where there is one only."""
        return stdev(self.speedups) if len(self.speedups) > 1 else None

    @property
    def saved(self) -> float:
        """The share of the FLOPs (of tokens, where a token costs the same) saved at the mean sp:
        1 - 1 / (1 + sp). An sp of 54.6% is 35.3% fewer."""
        return 1.0 - 1.0 / (1.0 + self.mean)


def loss_kind(runs: Sequence[RunCurves]) -> LossKind:
    """By which loss runs are compared: on fixed data where all have it, else while training."""
    validated = all(len(run.validation.loss) > 1 for run in runs)
    return "validation" if validated else "training"


def loss_curve(run: RunCurves, kind: LossKind, account: Account) -> LossCurve | None:
    """A run's loss against FLOPs, None where the account is unknown."""
    return run.curve(run.validation if kind == "validation" else run.train, account)


def speedup_along(
    scratch: Sequence[LossCurve], grown: Sequence[LossCurve], count: int = LEVELS
) -> list[Level]:
    """The speedup at up to `count` levels, from the highest shared loss to the lowest.

    The last one is the worst of all final losses. Empty where the curves share no loss, that is,
    where one of them is nowhere above the final loss of another.
    """
    levels = []
    for loss in shared_losses([*scratch, *grown], count):
        slow = [flops_to_reach(curve, loss) for curve in scratch]
        fast = [flops_to_reach(curve, loss) for curve in grown]
        pairs = [one / other for one in slow for other in fast if one is not None and other]
        if len(pairs) == len(scratch) * len(grown):
            levels.append(Level(loss, tuple(pair - 1.0 for pair in pairs)))
    return levels


def shared_losses(curves: Sequence[LossCurve], count: int) -> list[float]:
    """Evenly spaced losses between where all curves have begun and the worst final one."""
    low = max(curve.loss[-1] for curve in curves)
    high = min(_highest_after_start(curve) for curve in curves)
    if high <= low or count < 2:
        return [low]
    return [high + (low - high) * index / (count - 1) for index in range(count - 1)] + [low]


def _highest_after_start(curve: LossCurve) -> float:
    begun = START * curve.flops[-1]
    points = zip(curve.flops, curve.loss, strict=True)
    return max(loss for flops, loss in points if flops >= begun)
