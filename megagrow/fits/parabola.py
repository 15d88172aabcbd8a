"""The best choice of something positive at equal cost: the vertex of a parabola over its log10.

For each size N and budget C (IsoFLOP), loss = p0 + p1 x + p2 x^2 with x = log10 of what was tried
(tokens of the base, growth factors), by least squares; the best x is -p1 / (2 p2) (Du et al. 2024,
section 4.2). Its standard error is that of the delta method, with one variance of the losses for
all parabolas together: each alone has too few points to tell its own.

What the best choices follow is fitted by least squares, each weighted by the inverse variance that
it would have if it were where the fit says, and all parabolas bent alike. By its own bend and place
a vertex would weigh the more the more its noise has bent it, and moved it to the middle of what was
tried: the fit would be drawn there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megagrow.fits.data import IsoPoint
from megagrow.fits.least_squares import LinearFit, Numbers, fit_linear

FLAT = 1e-12
"""A parabola that rises by less than this share of the loss over what was tried is a line."""
ROUNDS = 4
"""Of weighting: the weights change little by then."""


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
    standard_error: float | None
    """Of log10 of the best; None where refused, or where no parabola has a point to spare."""
    refused: str | None
    """Why there is no best."""
    centre: float
    """Mean x of the points."""
    spread: tuple[float, float, float] | None
    """Variance of the slope at the centre, its covariance with p2, variance of p2, if the losses
    had errors of variance 1; None with the coefficients."""

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


def fit_best(parabolas: Sequence[Parabola], design: Numbers) -> LinearFit:
    """log10 of the best choices of n accepted parabolas = `design` (n, k) @ beta.

    Weights are relative to their mean. Raises ValueError where beta is not identifiable.
    """
    logs = np.log10(np.array([one.best for one in parabolas], dtype=np.float64))
    fit = fit_linear(design, logs)
    for _ in range(ROUNDS):
        expected = design @ fit.values
        weights = np.array([_weight(*pair) for pair in zip(parabolas, expected, strict=True)])
        fit = fit_linear(design, logs, weights / weights.mean())
    return fit


def _weight(parabola: Parabola, x: float) -> float:
    """The inverse variance of a vertex at `x`, up to a factor that is common to all."""
    assert parabola.spread is not None
    shift = x - parabola.centre
    slope, both, bend = parabola.spread
    return 1.0 / (slope / 4 + shift * both + shift**2 * bend)


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
    low, high = min(choices), max(choices)
    centre = float(_logs(points).mean())
    plain = Parabola(
        parameters=points[0].parameters,
        flops=points[0].flops,
        points=len(points),
        tried=(low, high),
        coefficients=None,
        best=None,
        standard_error=None,
        refused=f"{len(set(choices))} different {what}, a parabola needs 3",
        centre=centre,
        spread=None,
    )
    if fit is None:
        return plain
    level, slope, bend = (float(value) for value in fit.values)
    known = fit.unit_covariance
    fitted = replace(
        plain,
        coefficients=(level - slope * centre + bend * centre**2, slope - 2 * bend * centre, bend),
        spread=(float(known[1, 1]), float(known[1, 2]), float(known[2, 2])),
    )
    if bend * math.log10(high / low) ** 2 <= FLAT * abs(level):
        return replace(fitted, refused="no minimum: it does not bend up")
    best = centre - slope / (2 * bend)
    if not math.log10(low) <= best <= math.log10(high):
        reason = f"minimum outside of the {what} tried, {low:.3g} to {high:.3g}"
        return replace(fitted, refused=reason)
    error = None if variance is None else math.sqrt(variance / _weight(fitted, best)) / bend
    return replace(fitted, best=10**best, standard_error=error, refused=None)
