"""Mixing time of a growth: tokens until the grown run meets the run of fixed size.

After a growth the loss is above that of the same model trained from scratch on as many tokens. The
mixing time is the number of tokens from the last growth to the first point at which the grown run's
loss is at or below the other run's loss at the same number of tokens (after arXiv 2511.04981). From
there the two curves differ by noise, so that the grown run need not stay below. FLOPs are not
compared.
"""

from dataclasses import dataclass
from statistics import fmean

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.equal_cost import loss_at
from megagrow.analysis.seeds import Matchup
from megagrow.analysis.speedup_curve import LossKind, loss_series


@dataclass(frozen=True, slots=True)
class Mixing:
    """Mixing of a grown run with a run of fixed size; tokens count from the last growth."""

    tokens: float | None
    """Mixing time; None if the losses do not meet within the shared tokens."""
    loss: float | None
    """Loss at which they meet, in nats per token."""
    gap: float
    """Loss of the grown run minus that of the other run at the last shared measurement."""
    shared_tokens: int
    """Tokens of that measurement."""


@dataclass(frozen=True, slots=True)
class MixingTimes:
    """Mixing of all pairs of a grown and a fixed-size run of a matchup."""

    matchup: Matchup
    pairs: tuple[Mixing, ...]
    """At least one."""

    @property
    def met(self) -> list[float]:
        """Mixing times of the pairs that meet."""
        return [pair.tokens for pair in self.pairs if pair.tokens is not None]

    @property
    def tokens(self) -> float | None:
        """Mean mixing time; None unless all pairs meet."""
        return fmean(self.met) if len(self.met) == len(self.pairs) else None

    @property
    def gap(self) -> float:
        """Mean difference of the losses at the last shared measurements."""
        return fmean(pair.gap for pair in self.pairs)

    @property
    def shared_tokens(self) -> int:
        """Tokens after the growth that all pairs share."""
        return min(pair.shared_tokens for pair in self.pairs)


def mixing_times(matchup: Matchup) -> MixingTimes | None:
    """Return the mixing of all pairs, compared by `matchup.kind`.

    Return None if a run of fixed size ends before the first loss after the growth.
    """
    pairs = [
        measure_mixing(grown, fixed, matchup.kind)
        for grown in matchup.grown.runs
        for fixed in matchup.scratch.runs
    ]
    known = tuple(pair for pair in pairs if pair is not None)
    return MixingTimes(matchup, known) if len(known) == len(pairs) else None


def measure_mixing(grown: RunCurves, fixed: RunCurves, kind: LossKind) -> Mixing | None:
    """Return the mixing of one pair, or None if no loss after the growth can be compared.

    Losses are interpolated linearly in tokens. If the first loss after the growth is already at or
    below the other run's, its tokens are the mixing time.
    """
    start = grown.growths[-1].tokens
    series, reference = loss_series(grown, kind), loss_series(fixed, kind)
    points: list[tuple[int, float, float]] = []
    for at, loss in zip(series.tokens, series.loss, strict=True):
        other = loss_at(reference, "tokens", at)
        if start < at <= reference.tokens[-1] and other is not None:
            points.append((at - start, loss, loss - other))
    if not points:
        return None
    shared, _, gap = points[-1]
    met = next((index for index, point in enumerate(points) if point[2] <= 0), None)
    if met is None:
        return Mixing(None, None, gap, shared)
    tokens, loss, below = points[met]
    if met == 0:
        return Mixing(tokens, loss, gap, shared)
    before, loss_before, above = points[met - 1]
    share = above / (above - below)
    crossing = before + share * (tokens - before)
    return Mixing(crossing, loss_before + share * (loss - loss_before), gap, shared)
