"""What a growth did to the training loss: how high it jumped, and how long until it was back."""

from dataclasses import dataclass

from megagrow.analysis.curves import Growth, RunCurves


@dataclass(frozen=True, slots=True)
class Spike:
    """The training loss around one growth, smoothed as `curves.smooth` does it."""

    growth: Growth
    before: float
    """The last one before the growth."""
    peak: float
    """The highest one after it, until it is back."""
    tokens_until_back: int | None
    """From the growth to the first loss that is no higher than `before`; None where the stage
    ends sooner."""


def spikes(run: RunCurves) -> list[Spike]:
    """The spike of each growth that has training losses on both sides."""
    found = []
    bounds = [*(growth.tokens for growth in run.growths), run.tokens]
    points = list(zip(run.train.tokens, run.train.loss, strict=True))
    for growth, end in zip(run.growths, bounds[1:], strict=True):
        before = [loss for at, loss in points if at <= growth.tokens]
        after = [(at, loss) for at, loss in points if growth.tokens < at <= end]
        if before and after:
            found.append(_spike(growth, before[-1], after))
    return found


def _spike(growth: Growth, before: float, after: list[tuple[int, float]]) -> Spike:
    back = next((index for index, (_, loss) in enumerate(after) if loss <= before), None)
    peak = max(loss for _, loss in after[: None if back is None else back + 1])
    return Spike(growth, before, peak, None if back is None else after[back][0] - growth.tokens)
