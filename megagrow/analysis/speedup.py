"""Speedup of growth as defined in the paper: ratio of FLOPs to the same loss, base included.

    sp = FLOPs_scratch / FLOPs_grown - 1    (arXiv 2405.15319, equation 48, appendix B.2)

The two runs are compared at the worse of their final losses, the lowest loss that both reach. A
curve reaches a loss at the end of its last segment above that loss. A dip before the loss spike of
a growth therefore does not count, and neither does early noise. Between two points the loss is
interpolated linearly in log FLOPs.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Loss against cumulative FLOPs, in training order.

    Raises ValueError if there are no points, the columns differ in length, a loss is not finite, or
    the FLOPs decrease.
    """

    flops: tuple[float, ...]
    """Non-decreasing; two equal values mark a jump of the loss, such as a growth."""
    loss: tuple[float, ...]
    """Nats per token."""

    def __post_init__(self) -> None:
        if not self.flops or len(self.flops) != len(self.loss):
            raise ValueError(
                f"{len(self.flops)} FLOPs and {len(self.loss)} losses: need the same number, > 0"
            )
        if not all(math.isfinite(loss) for loss in self.loss):
            raise ValueError("a loss is not finite")
        if any(later < sooner for sooner, later in zip(self.flops, self.flops[1:], strict=False)):
            raise ValueError("the FLOPs decrease")


@dataclass(frozen=True, slots=True)
class Speedup:
    """FLOPs of a grown run and of a run from scratch at the same loss (nats per token)."""

    loss: float
    flops_scratch: float
    flops_grown: float
    final_scratch: float
    final_grown: float

    @property
    def speedup(self) -> float:
        """Speedup sp; negative if growth was slower."""
        return self.flops_scratch / self.flops_grown - 1.0

    @property
    def saved(self) -> float:
        """Fraction of the FLOPs that growth saves: sp / (1 + sp), not sp."""
        return 1.0 - self.flops_grown / self.flops_scratch


def measure_speedup(scratch: LossCurve, grown: LossCurve) -> Speedup | None:
    """Return the speedup at the worse of the two final losses.

    Return None if one of the curves is never above that loss, so that its FLOPs there are unknown.
    """
    loss = max(scratch.loss[-1], grown.loss[-1])
    flops_scratch, flops_grown = flops_to_reach(scratch, loss), flops_to_reach(grown, loss)
    if flops_scratch is None or flops_grown is None:
        return None
    return Speedup(loss, flops_scratch, flops_grown, scratch.loss[-1], grown.loss[-1])


def flops_to_reach(curve: LossCurve, loss: float) -> float | None:
    """Return the FLOPs after which `curve` stays at or below `loss`.

    Return None if the curve ends above `loss` or is never above it.
    """
    above = [index for index, value in enumerate(curve.loss) if value > loss]
    if not above or above[-1] == len(curve.loss) - 1:
        return None
    last = above[-1]
    share = (curve.loss[last] - loss) / (curve.loss[last] - curve.loss[last + 1])
    return _between(curve.flops[last], curve.flops[last + 1], share)


def _between(low: float, high: float, share: float) -> float:
    """Interpolate from `low` to `high` at fraction `share` on a log scale; linearly if low = 0."""
    return low ** (1.0 - share) * high**share if low > 0 else share * high
