"""What a growth did to its run: the spike, the way back, the loss later; and spreads over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megagrow.analysis.curves import Growth, RunCurves
from megagrow.errors import DataError
from megagrow.train.reporting.writers import Record

CurvePoint = tuple[float, float]
"""Tokens since the growth, and a loss in nats per token."""

STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95%, for 1, 2, ... degrees of freedom; beyond, the last is a bound."""


@dataclass(frozen=True, slots=True)
class Aftermath:
    """A run after its last growth; losses in nats per token, tokens counted from the growth."""

    before: float
    """Validation loss of the model that was grown."""
    spike: float
    """Loss on the fixed batch right after the growth, less that right before it."""
    excess: float
    """The highest validation loss measured in the first tokens after the growth, less `before`."""
    recovery: float | None
    """Tokens until the validation loss is back at `before` and stays there; None if it never is."""
    quarter: float
    """Validation loss after a quarter of the stage."""
    half: float
    end: float
    validation: tuple[CurvePoint, ...]


def aftermath(records: Sequence[Record], first_tokens: int, where: str = "the run") -> Aftermath:
    """Reads a run's metrics; `excess` looks at the first `first_tokens` tokens after the growth.

    Between two measurements losses are taken as linear in tokens. At the growth itself the grown
    model's validation loss is `before` plus the spike on the fixed batch, which is the beginning of
    the validation corpus. Raises InputError, naming `where`, if there was no growth, or no loss was
    measured where it is needed.
    """
    growths = [record for record in records if record["kind"] == "growth"]
    if not growths:
        raise DataError(f"{where}: no growth was recorded")
    growth = growths[-1]
    validations = [record for record in records if record["kind"] == "validation"]
    earlier = [r["loss"] for r in validations if r["stage"] == growth["stage"] - 1]
    points = tuple(
        (r["tokens"] - growth["tokens"], r["loss"])
        for r in validations
        if r["stage"] == growth["stage"]
    )
    close = [loss for tokens, loss in points if tokens <= first_tokens]
    needed = [growth["loss_before"], growth["loss_after"], *earlier[-1:]]
    needed += [loss for _, loss in points]
    if not earlier or not close or None in needed:
        raise DataError(
            f"{where}: a loss at the growth or after it is missing or not finite; lower "
            "validation.interval, or the learning rate if it diverged"
        )
    before, spike = earlier[-1], growth["loss_after"] - growth["loss_before"]
    curve, tokens = ((0.0, before + spike), *points), points[-1][0]
    return Aftermath(
        before,
        spike,
        max(close) - before,
        tokens_to_reach(curve, before),
        loss_at(curve, tokens / 4),
        loss_at(curve, tokens / 2),
        points[-1][1],
        points,
    )


def tokens_to_reach(curve: Sequence[CurvePoint], loss: float) -> float | None:
    """Tokens at which a curve gets to `loss` and stays: 0 if it is never above, None if it ends
    above."""
    above = [index for index, (_, value) in enumerate(curve) if value > loss]
    if not above:
        return 0.0
    if above[-1] == len(curve) - 1:
        return None
    (left, high), (right, low) = curve[above[-1]], curve[above[-1] + 1]
    return left + (right - left) * (high - loss) / (high - low)


def loss_at(curve: Sequence[CurvePoint], tokens: float) -> float:
    """The loss at `tokens`, which lie within the curve."""
    for (left, first), (right, second) in pairwise(curve):
        if left <= tokens <= right:
            return first + (second - first) * (tokens - left) / (right - left)
    raise ValueError(f"{tokens} tokens are outside the curve, {curve[0][0]} to {curve[-1][0]}")


@dataclass(frozen=True, slots=True)
class Spread:
    """Several seeds' values of one quantity."""

    mean: float
    deviation: float
    """Standard deviation of the sample (n - 1); NaN for a single value."""
    count: int

    @property
    def margin(self) -> float:
        """Half the width of the mean's 95% confidence interval (Student)."""
        if self.count == 1:
            return math.nan
        factor = STUDENT_95[min(self.count - 1, len(STUDENT_95)) - 1]
        return factor * self.deviation / math.sqrt(self.count)

    @property
    def is_clear(self) -> bool:
        """Whether that interval leaves out zero."""
        return abs(self.mean) > self.margin


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation; None unless every seed has a value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else math.nan
    return Spread(statistics.fmean(known), deviation, len(known))


def paired(values: Sequence[float | None], others: Sequence[float | None]) -> Spread | None:
    """The spread of value - other, seed by seed; both are in the same order of seeds."""
    return spread(
        [
            None if value is None or other is None else value - other
            for value, other in zip(values, others, strict=True)
        ]
    )


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
