"""The speedup of growth as the paper defines it: FLOPs to the same loss, base included.

    sp = FLOPs_scratch / FLOPs_grown - 1    (arXiv 2405.15319, equation 48, appendix B.2)

The same loss is the worse of the two final losses: the best one that both runs have reached. A
curve has reached a loss where it first gets there and stays, that is, where its last stretch above
that loss ends. A dip before the spike of a growth does therefore not count, nor does luck early in
a noisy curve. Between two points the loss is taken as linear in log FLOPs.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossCurve:
    """A loss against the FLOPs spent so far; at least one point, in the order of the run."""

    flops: tuple[float, ...]
    """Not falling; equal ones are the two sides of a jump, such as a growth."""
    loss: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.flops or len(self.flops) != len(self.loss):
            raise ValueError(f"{len(self.flops)} FLOPs for {len(self.loss)} losses")
        if not all(math.isfinite(loss) for loss in self.loss):
            raise ValueError("a loss is not finite")
        if any(later < sooner for sooner, later in zip(self.flops, self.flops[1:], strict=False)):
            raise ValueError("the FLOPs fall")


@dataclass(frozen=True, slots=True)
class Speedup:
    """Growth against training from scratch, at one loss."""

    loss: float
    flops_scratch: float
    flops_grown: float
    final_scratch: float
    final_grown: float

    @property
    def speedup(self) -> float:
        """sp; negative where growth was the slower way."""
        return self.flops_scratch / self.flops_grown - 1.0

    @property
    def saved(self) -> float:
        """The share of the FLOPs that growth saves; not to be confused with sp."""
        return 1.0 - self.flops_grown / self.flops_scratch


def measure_speedup(scratch: LossCurve, grown: LossCurve) -> Speedup | None:
    """The speedup at the worse of the two final losses.

    None where there is nothing to measure: one of the curves is nowhere above that loss, so that
    it is unknown when it got there.
    """
    loss = max(scratch.loss[-1], grown.loss[-1])
    slow, fast = flops_to_reach(scratch, loss), flops_to_reach(grown, loss)
    if slow is None or fast is None:
        return None
    return Speedup(loss, slow, fast, scratch.loss[-1], grown.loss[-1])


def flops_to_reach(curve: LossCurve, loss: float) -> float | None:
    """The FLOPs at which `curve` gets to `loss` and stays there.

    None where it ends above `loss`, or is never above it: the point is then outside the curve.
    """
    above = [index for index, value in enumerate(curve.loss) if value > loss]
    if not above or above[-1] == len(curve.loss) - 1:
        return None
    last = above[-1]
    share = (curve.loss[last] - loss) / (curve.loss[last] - curve.loss[last + 1])
    return _between(curve.flops[last], curve.flops[last + 1], share)


def _between(low: float, high: float, share: float) -> float:
    """The point `share` of the way from `low` to `high`, on a log scale; linear from 0 FLOPs."""
    return low ** (1.0 - share) * high**share if low > 0 else share * high
