"""Speedup of growth at all losses of the curves, and its spread over seeds.

sp and the saved fraction of FLOPs are measured as in `speedup`, at a series of losses that all runs
reach. Every grown run is compared with every run from scratch. The report shows the mean over these
pairs, their range and their sample standard deviation. Pairs share runs, so the deviation describes
the variation between seeds and is not a standard error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from megagrow.analysis.curves import RunCurves, Series
from megagrow.analysis.flop_accounting import Account
from megagrow.analysis.speedup import LossCurve, flops_to_reach

LEVELS = 64
"""Maximum number of loss levels."""
START_SHARE = 0.06
"""Fraction of each run's FLOPs whose steep initial losses are excluded from the levels."""
LossKind = Literal["validation", "training"]


@dataclass(frozen=True, slots=True)
class Level:
    """Speedups at one loss, for all pairs of a grown run and a run from scratch."""

    loss: float
    """Nats per token."""
    speedups: tuple[float, ...]
    """sp of each pair; at least one."""

    @property
    def mean(self) -> float:
        """Mean sp."""
        return fmean(self.speedups)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of sp over the pairs; None for a single pair."""
        return stdev(self.speedups) if len(self.speedups) > 1 else None

    @property
    def saved(self) -> float:
        """Fraction of FLOPs saved at the mean sp, 1 - 1 / (1 + sp): 35.3% for an sp of 54.6%.

        Equal to the fraction of tokens saved if a token costs the same in both runs.
        """
        return 1.0 - 1.0 / (1.0 + self.mean)


def loss_kind(runs: Sequence[RunCurves]) -> LossKind:
    """Return "validation" if all runs have a validation curve, else "training"."""
    validated = all(len(run.validation.loss) > 1 for run in runs)
    return "validation" if validated else "training"


def loss_curve(run: RunCurves, kind: LossKind, account: Account) -> LossCurve | None:
    """Return a run's loss against FLOPs by an account, or None if the account is unknown."""
    return run.curve(loss_series(run, kind), account)


def loss_series(run: RunCurves, kind: LossKind) -> Series:
    """Return the validation losses or the smoothed training losses of a run."""
    return run.validation if kind == "validation" else run.train


def speedup_curve_levels(
    scratch: Sequence[LossCurve], grown: Sequence[LossCurve], count: int = LEVELS
) -> list[Level]:
    """Return the speedup at up to `count` losses, from the highest shared loss to the lowest.

    The lowest one is the worst of all final losses. The list is empty if the curves share no loss:
    one of them is never above the final loss of another.
    """
    levels = []
    for loss in shared_losses([*scratch, *grown], count):
        scratch_flops = [flops_to_reach(curve, loss) for curve in scratch]
        grown_flops = [flops_to_reach(curve, loss) for curve in grown]
        ratios = [s / g for s in scratch_flops for g in grown_flops if s and g]
        if len(ratios) == len(scratch) * len(grown):
            levels.append(Level(loss, tuple(ratio - 1.0 for ratio in ratios)))
    return levels


def shared_losses(curves: Sequence[LossCurve], count: int) -> list[float]:
    """Return evenly spaced losses that all curves reach, from the highest to the lowest.

    The highest is the lowest maximum of a curve after its first `START_SHARE` of FLOPs, the lowest
    is the worst final loss.
    """
    low = max(curve.loss[-1] for curve in curves)
    high = min(_highest_after_start(curve) for curve in curves)
    if high <= low or count < 2:
        return [low]
    return [high + (low - high) * index / (count - 1) for index in range(count - 1)] + [low]


def _highest_after_start(curve: LossCurve) -> float:
    start = START_SHARE * curve.flops[-1]
    points = zip(curve.flops, curve.loss, strict=True)
    return max(loss for flops, loss in points if flops >= start)
