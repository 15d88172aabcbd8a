"""Best positive choice at equal cost: vertex of a parabola over its log10.

For each size N and budget C (IsoFLOP), loss = p0 + p1 x + p2 x^2 is fitted by least squares. x is
log10 of the choice (base tokens d or growth factor g). The best x is -p1 / (2 p2) (Du et al. 2024,
section 4.2). Its standard error follows from the delta method, with one pooled variance of
the losses: a single parabola has too few points to estimate its own.

A law for the best choices is fitted by weighted least squares. The weight of a vertex is the
inverse variance it would have at the position predicted by the fit, with equal curvature of all
parabolas. Weights from a vertex's own curvature and position would be biased: noise that increases
the curvature or moves the vertex to the middle of the tried range would increase its weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megagrow.errors import DataError
from megagrow.fits.data import Data, IsoPoint
from megagrow.fits.least_squares import Constant, LinearFit, Numbers, fit_linear

FLAT = 1e-12
"""Minimum rise of a parabola over the tried range, relative to the loss, to count as curved."""
ROUNDS = 4
"""Iterations of the reweighting; the weights have converged by then."""


@dataclass(frozen=True, slots=True)
class Parabola:
    """Parabola fitted at one size and one budget."""

    parameters: float
    """N, non-embedding parameters."""
    flops: float
    """C, the budget."""
    points: int
    """Number of points."""
    tried: tuple[float, float]
    """Smallest and largest choice in the data."""
    coefficients: tuple[float, float, float] | None
    """p0, p1, p2; None if there were too few points."""
    best: float | None
    """Choice at the vertex; None if refused."""
    standard_error: float | None
    """Standard error of log10 of `best`; None if refused, or without degrees of freedom."""
    refused: str | None
    """Reason why there is no best choice; None if there is one."""
    center: float
    """Mean x of the points."""
    spread: tuple[float, float, float] | None
    """Variance of the slope at the center, its covariance with p2, and the variance of p2.

    They are for losses with error variance 1. None without coefficients.
    """

    def loss_at(self, choice: Numbers) -> Numbers:
        """Evaluate the parabola at choices (n,); `coefficients` must not be None."""
        assert self.coefficients is not None
        return np.polyval(self.coefficients[::-1], np.log10(choice))


def fit_parabolas(points: Sequence[IsoPoint], symbol: str) -> list[Parabola]:
    """Fit a parabola for each size and budget, sorted by both; seeds are pooled.

    `symbol` is the choice's name, `d` or `g`, in the reasons for refusal.
    """
    groups: dict[tuple[float, float], list[IsoPoint]] = {}
    for point in points:
        groups.setdefault((point.parameters, point.flops), []).append(point)
    fits = {key: _fit(groups[key]) for key in sorted(groups)}
    fitted = [fit for fit in fits.values() if fit is not None]
    dof = sum(fit.dof for fit in fitted)
    variance = sum(fit.squares for fit in fitted) / dof if dof else None
    return [_parabola(groups[key], fit, variance, symbol) for key, fit in fits.items()]


def accepted(parabolas: Sequence[Parabola]) -> list[Parabola]:
    """Return the parabolas with a best choice."""
    return [one for one in parabolas if one.refused is None]


def fit_best(parabolas: Sequence[Parabola], design: Numbers) -> LinearFit:
    """Fit log10 of the best choices of n accepted parabolas = `design` (n, k) @ beta.

    Weights are normalized to mean 1. Raises ValueError if beta is not identifiable.
    """
    logs = np.log10(np.array([one.best for one in parabolas], dtype=np.float64))
    fit = fit_linear(design, logs)
    for _ in range(ROUNDS):
        expected = design @ fit.values
        weights = np.array([_weight(*pair) for pair in zip(parabolas, expected, strict=True)])
        fit = fit_linear(design, logs, weights / weights.mean())
    return fit


def _weight(parabola: Parabola, x: float) -> float:
    """Return the inverse variance of a vertex at `x`, up to a common factor."""
    assert parabola.spread is not None
    shift = x - parabola.center
    slope_variance, covariance, curvature_variance = parabola.spread
    return 1.0 / (slope_variance / 4 + shift * covariance + shift**2 * curvature_variance)


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
    points: Sequence[IsoPoint], fit: LinearFit | None, variance: float | None, symbol: str
) -> Parabola:
    choices = [point.choice for point in points]
    low, high = min(choices), max(choices)
    center = float(_logs(points).mean())
    unfitted = Parabola(
        parameters=points[0].parameters,
        flops=points[0].flops,
        points=len(points),
        tried=(low, high),
        coefficients=None,
        best=None,
        standard_error=None,
        refused=f"only {len(set(choices))} distinct values of {symbol}, at least 3 are required",
        center=center,
        spread=None,
    )
    if fit is None:
        return unfitted
    level, slope, p2 = (float(value) for value in fit.values)
    covariance = fit.unit_covariance
    fitted = replace(
        unfitted,
        coefficients=(level - slope * center + p2 * center**2, slope - 2 * p2 * center, p2),
        spread=(float(covariance[1, 1]), float(covariance[1, 2]), float(covariance[2, 2])),
    )
    if p2 * math.log10(high / low) ** 2 <= FLAT * abs(level):
        return replace(fitted, refused="no minimum: the curvature is not positive")
    best = center - slope / (2 * p2)
    if not math.log10(low) <= best <= math.log10(high):
        reason = f"minimum outside the tried range of {symbol}, {low:.3g} to {high:.3g}"
        return replace(fitted, refused=reason)
    error = None if variance is None else math.sqrt(variance / _weight(fitted, best)) / p2
    return replace(fitted, best=10**best, standard_error=error, refused=None)


PAPER_BEST = (2.0, 4.0)
"""Range of the paper's optimum; the paper recommends 4."""


@dataclass(frozen=True, slots=True)
class FactorFit:
    """Recommended growth factor."""

    log10_factor: Constant
    factor: float
    low: float | None
    """Lower end of the 95% interval; None for a single vertex."""
    high: float | None
    """Upper end of the 95% interval; None for a single vertex."""
    nearest_tried: float
    """Nearest factor in the data, on the log axis."""


def factor_parabolas(data: Data[IsoPoint]) -> list[Parabola]:
    """Fit a parabola of the loss over log10 g for each N and C."""
    return fit_parabolas(data.points, "g")


def fit_factor(data: Data[IsoPoint], parabolas: Sequence[Parabola]) -> FactorFit:
    """Fit one g to the parabolas with a minimum. Raises InputError if there are none."""
    used = accepted(parabolas)
    if not used:
        raise DataError(
            f"{data.source}: no parabola has a best g ({parabolas[0].refused}); try more g"
            if parabolas
            else f"{data.source}: no growth factor above 1; at least 3 are required"
        )
    mean = fit_best(used, np.ones((len(used), 1))).constant(0)
    low, high = (None if end is None else 10**end for end in (mean.low, mean.high))
    tried = sorted({point.choice for point in data.points})
    nearest = min(tried, key=lambda g: abs(np.log10(g) - mean.value))
    return FactorFit(mean, 10**mean.value, low, high, nearest)
