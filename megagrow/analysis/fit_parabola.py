"""The best choice of something positive at equal cost: the vertex of a parabola over its log10.

For each size N and budget C (IsoFLOP), loss = p0 + p1 x + p2 x^2 with x = log10 of what was tried
(tokens of the base, growth factors), by least squares; the best x is -p1 / (2 p2) (Du et al. 2024,
section 4.2). Its standard error is that of the delta method, with one variance of the losses for
all parabolas together: each alone has too few points to tell its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagrow.analysis.fit_data import IsoPoint
from megagrow.analysis.fit_least_squares import LinearFit, Numbers, fit_linear

FLAT = 1e-12
"""A parabola that rises by less than this share of the loss over what was tried is a line."""


@dataclass(frozen=True, slots=True)
class Parabola:
    """The fit at one size and one budget."""

    parameters: float
    flops: float
    points: int
    tried: tuple[float, float]
    """The smallest and the largest choice."""
    coefficients: tuple[float, float, float] | None
    """p0, p1, p2; None where there were too few points."""
    best: float | None
    """The choice at the vertex; None where `refused`."""
    unit_error: float | None
    """Standard error of log10 of the best, if the losses had errors of variance 1."""
    standard_error: float | None
    """Of log10 of the best; None where refused, or where no parabola has a point to spare."""
    refused: str | None
    """Why there is no best."""

    def loss_at(self, choice: Numbers) -> Numbers:
        """The parabola at choices (n,), where it was fitted."""
        assert self.coefficients is not None
        return np.polyval(self.coefficients[::-1], np.log10(choice))


def fit_parabolas(points: Sequence[IsoPoint], what: str) -> list[Parabola]:
    """A parabola for each size and budget, in their order; all seeds of a budget in one.

    `what` names the choice in reasons of refusal: `d` or `g`.
    """
    groups: dict[tuple[float, float], list[IsoPoint]] = {}
    for point in points:
        groups.setdefault((point.parameters, point.flops), []).append(point)
    fits = {key: _fit(groups[key]) for key in sorted(groups)}
    told = [fit for fit in fits.values() if fit is not None]
    freedom = sum(fit.freedom for fit in told)
    variance = sum(fit.squares for fit in told) / freedom if freedom else None
    return [_parabola(groups[key], fit, variance, what) for key, fit in fits.items()]


def accepted(parabolas: Sequence[Parabola]) -> list[Parabola]:
    """Those with a best choice."""
    return [one for one in parabolas if one.refused is None]


def logs_and_weights(parabolas: Sequence[Parabola]) -> tuple[Numbers, Numbers]:
    """log10 of the best choices (n,), and their weights (n,) in a further fit."""
    best = np.array([one.best for one in parabolas], dtype=np.float64)
    errors = np.array([one.unit_error for one in parabolas], dtype=np.float64)
    return np.log10(best), errors**-2.0


def _fit(points: Sequence[IsoPoint]) -> LinearFit | None:
    x = _logs(points)
    if len(np.unique(x)) < 3:
        return None
    shifted = x - x.mean()
    losses = np.array([point.loss for point in points])
    return fit_linear(np.stack([np.ones_like(x), shifted, shifted**2], axis=1), losses)


def _logs(points: Sequence[IsoPoint]) -> Numbers:
    return np.log10(np.array([point.choice for point in points], dtype=np.float64))


def _parabola(
    points: Sequence[IsoPoint], fit: LinearFit | None, variance: float | None, what: str
) -> Parabola:
    choices = [point.choice for point in points]
    tried = min(choices), max(choices)
    head = points[0].parameters, points[0].flops, len(points), tried
    if fit is None:
        reason = f"{len(set(choices))} different {what}, a parabola needs 3"
        return Parabola(*head, None, None, None, None, reason)
    level, slope, bend = (float(value) for value in fit.values)
    centre = float(_logs(points).mean())
    coefficients = (level - slope * centre + bend * centre**2, slope - 2 * bend * centre, bend)
    if bend * math.log10(tried[1] / tried[0]) ** 2 <= FLAT * abs(level):
        return Parabola(*head, coefficients, None, None, None, "no minimum: it does not bend up")
    shift = -slope / (2 * bend)
    if not math.log10(tried[0]) <= centre + shift <= math.log10(tried[1]):
        reason = f"minimum outside of the {what} tried, {tried[0]:.3g} to {tried[1]:.3g}"
        return Parabola(*head, coefficients, None, None, None, reason)
    gradient = np.array([0.0, -1 / (2 * bend), slope / (2 * bend**2)])
    unit = float(np.sqrt(gradient @ fit.unit_covariance @ gradient))
    error = None if variance is None else unit * math.sqrt(variance)
    return Parabola(*head, coefficients, 10 ** (centre + shift), unit, error, None)
