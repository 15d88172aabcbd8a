"""Training after a growth: loss spike, recovery and later losses, with spreads over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from scipy.stats import t as student_t

from megagrow.analysis.curves import Growth, RunCurves
from megagrow.analysis.run_records import validation_records
from megagrow.errors import DataError
from megagrow.train.reporting.writers import Record

CurvePoint = tuple[float, float]
"""Tokens since the growth and loss in nats per token."""


@dataclass(frozen=True, slots=True)
class GrowthTransient:
    """Losses of a run after its last growth, in nats per token; tokens count from the growth."""

    before: float
    """Last validation loss before the growth."""
    spike: float
    """Loss on the fixed batch directly after the growth minus the loss directly before it."""
    excess: float
    """Highest validation loss in the first tokens after the growth minus `before`."""
    recovery: float | None
    """Tokens until the validation loss stays at or below `before`; None if it never does."""
    quarter: float
    """Validation loss after a quarter of the stage."""
    half: float
    """Validation loss after half of the stage."""
    end: float
    """Last validation loss of the stage."""
    validation: tuple[CurvePoint, ...]
    """All validation losses of the stage."""


def read_transient(
    records: Sequence[Record], first_tokens: int, where: str = "the run"
) -> GrowthTransient:
    """Compute the transient of the last growth from a run's metrics records.

    `excess` is measured over the first `first_tokens` tokens after the growth. Losses are
    interpolated linearly in tokens. The grown model's validation loss at the growth is taken as
    `before` plus the spike on the fixed batch, which is the start of the validation corpus. Raises
    InputError, with `where` in the message, if there was no growth or a required loss is missing.
    """
    growths = [record for record in records if record["kind"] == "growth"]
    if not growths:
        raise DataError(f"{where}: no growth was recorded")
    growth = growths[-1]
    validations = next(iter(validation_records(records).values()), [])
    before_growth = [r["loss"] for r in validations if r["stage"] == growth["stage"] - 1]
    points = tuple(
        (r["tokens"] - growth["tokens"], r["loss"])
        for r in validations
        if r["stage"] == growth["stage"]
    )
    first_losses = [loss for tokens, loss in points if tokens <= first_tokens]
    required = [growth["loss_before"], growth["loss_after"], *before_growth[-1:]]
    required += [loss for _, loss in points]
    if not before_growth or not first_losses or None in required:
        raise DataError(
            f"{where}: a loss at the growth or after it is missing or not finite; lower "
            "validation.interval, or the learning rate if it diverged"
        )
    before, spike = before_growth[-1], growth["loss_after"] - growth["loss_before"]
    curve, tokens = ((0.0, before + spike), *points), points[-1][0]
    return GrowthTransient(
        before,
        spike,
        max(first_losses) - before,
        tokens_to_reach(curve, before),
        loss_at(curve, tokens / 4),
        loss_at(curve, tokens / 2),
        points[-1][1],
        points,
    )


def tokens_to_reach(curve: Sequence[CurvePoint], loss: float) -> float | None:
    """Return the tokens after which a curve stays at or below `loss`.

    Return 0 if the curve is never above `loss`, and None if it ends above it.
    """
    above = [index for index, (_, value) in enumerate(curve) if value > loss]
    if not above:
        return 0.0
    if above[-1] == len(curve) - 1:
        return None
    (left, high), (right, low) = curve[above[-1]], curve[above[-1] + 1]
    return left + (right - left) * (high - loss) / (high - low)


def loss_at(curve: Sequence[CurvePoint], tokens: float) -> float:
    """Return the interpolated loss at `tokens`. Raises ValueError outside the curve."""
    for (left, first), (right, second) in pairwise(curve):
        if left <= tokens <= right:
            return first + (second - first) * (tokens - left) / (right - left)
    raise ValueError(f"{tokens} tokens are outside the curve, {curve[0][0]} to {curve[-1][0]}")


def t_quantile(dof: int) -> float:
    """Return the half-width of a two-sided 95% interval in standard errors."""
    return float(student_t.ppf(0.975, dof))


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation of one quantity over several seeds."""

    mean: float
    deviation: float
    """Sample standard deviation (n - 1); NaN for a single value."""
    count: int

    @property
    def margin(self) -> float:
        """Half-width of the mean's 95% confidence interval (Student's t); NaN for one value."""
        if self.count == 1:
            return math.nan
        factor = t_quantile(self.count - 1)
        return factor * self.deviation / math.sqrt(self.count)

    @property
    def is_clear(self) -> bool:
        """True if the 95% confidence interval excludes zero."""
        return abs(self.mean) > self.margin


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean and deviation, or None unless every seed has a value."""
    present = [value for value in values if value is not None]
    if not present or len(present) < len(values):
        return None
    deviation = statistics.stdev(present) if len(present) > 1 else math.nan
    return Spread(statistics.fmean(present), deviation, len(present))


def paired_spread(values: Sequence[float | None], others: Sequence[float | None]) -> Spread | None:
    """Return the spread of `value - other` per seed; both are in the same order of seeds."""
    return spread(
        [
            None if value is None or other is None else value - other
            for value, other in zip(values, others, strict=True)
        ]
    )


@dataclass(frozen=True, slots=True)
class Spike:
    """Training loss around one growth, smoothed by `curves.smooth`."""

    growth: Growth
    before: float
    """Last loss before the growth, in nats per token."""
    peak: float
    """Highest loss after the growth until recovery."""
    recovery_tokens: int | None
    """Tokens from the growth to the first loss not above `before`; None if the stage ends first."""


def spikes(run: RunCurves) -> list[Spike]:
    """Return the spike of each growth with training losses on both sides."""
    result = []
    bounds = [*(growth.tokens for growth in run.growths), run.tokens]
    points = list(zip(run.train.tokens, run.train.loss, strict=True))
    for growth, end in zip(run.growths, bounds[1:], strict=True):
        before = [loss for at, loss in points if at <= growth.tokens]
        after = [(at, loss) for at, loss in points if growth.tokens < at <= end]
        if before and after:
            result.append(_spike(growth, before[-1], after))
    return result


def _spike(growth: Growth, before: float, after: list[tuple[int, float]]) -> Spike:
    end = next((index for index, (_, loss) in enumerate(after) if loss <= before), None)
    peak = max(loss for _, loss in after[: None if end is None else end + 1])
    return Spike(growth, before, peak, None if end is None else after[end][0] - growth.tokens)
