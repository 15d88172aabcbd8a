"""Scaling laws of loss against compute fitted to runs: L = a C^b + e, for scratch and for grown.

The constants are fitted by least squares on the losses. Intervals are 95% Student's t intervals
from the delta method: errors of the constants follow from the Jacobian at the solution, errors of
derived quantities from their gradients. The interval of a is computed for log a, that of the saving
for the log of the FLOP ratio. Bands are confidence bands of the curve, not of single runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from megagrow.analysis.growth_transient import t_quantile
from megagrow.errors import DataError
from megagrow.fits.data import Data, RunKind, ScalingPoint
from megagrow.fits.least_squares import (
    Constant,
    Numbers,
    fit_linear,
    with_interval,
)

FLOORS = np.concatenate([[0.0], 1.0 - np.geomspace(1.0, 1e-3, 60)[1:]])
"""Initial values of e to try, as fractions of the lowest loss."""
MAX_EXPONENT = -1e-6
"""Largest exponent b that is accepted as decreasing."""


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Fitted law L = a C^b + e, C in FLOPs, L in nats per token."""

    kind: RunKind
    a: Constant
    b: Constant
    e: Constant
    """Loss floor; 0 without an error if it is not fitted."""
    points: int
    """Number of points."""
    flops: tuple[float, float]
    """Smallest and largest budget of the points."""
    center: float
    """Mean log C of the points; centring makes the errors of log a and b nearly independent."""
    theta: tuple[float, ...]
    """log a at the center, b, and e if it is fitted."""
    covariance: tuple[tuple[float, ...], ...] | None
    """Covariance of theta, (k, k); None without degrees of freedom."""

    @property
    def dof(self) -> int:
        """Degrees of freedom: number of points minus number of constants."""
        return self.points - len(self.theta)

    def loss(self, flops: Numbers) -> Numbers:
        """Return L (n,) at budgets (n,)."""
        return _loss(np.array(self.theta), np.log(flops) - self.center)

    def gradient(self, flops: Numbers) -> Numbers:
        """Return the gradient of L with respect to theta, (n, k), at budgets (n,)."""
        return _gradient(np.array(self.theta), np.log(flops) - self.center)

    def band(self, flops: Numbers) -> tuple[Numbers, Numbers] | None:
        """Return the 95% band of the curve at budgets (n,), or None without degrees of freedom."""
        if self.covariance is None:
            return None
        rows = self.gradient(flops)
        errors = np.sqrt(np.einsum("ni,ij,nj->n", rows, np.array(self.covariance), rows))
        losses, half_width = self.loss(flops), errors * t_quantile(self.dof)
        return losses - half_width, losses + half_width


@dataclass(frozen=True, slots=True)
class FlopSaving:
    """Saving of growth at one budget: scratch FLOPs for the same loss / C - 1."""

    flops: float
    """C of the grown run, base included."""
    loss: float
    """Loss of the grown law at C, in nats per token."""
    scratch_flops: float | None
    """FLOPs from scratch to the same loss; None if the floor of the scratch law is higher."""
    saving: float | None
    low: float | None
    """Lower end of the 95% interval; None if unknown."""
    high: float | None
    """Upper end of the 95% interval; None if unknown."""
    beyond_grown: float
    """C / largest budget of the grown points; above 1 the law is extrapolated."""
    beyond_scratch: float | None
    """`scratch_flops` / largest budget of the scratch points."""


def fit_scaling(data: Data[ScalingPoint], floor: bool = True) -> tuple[PowerLaw, PowerLaw]:
    """Fit the laws of runs from scratch and of grown runs; e is fixed to 0 without `floor`.

    Raises InputError if a kind has fewer different budgets than constants, if its losses do not
    decrease, or if they do not determine a floor.
    """
    return _fit(data, "scratch", floor), _fit(data, "grown", floor)


def saving_at(scratch: PowerLaw, grown: PowerLaw, flops: float) -> FlopSaving:
    """Return the saving of growth at budget `flops`.

    The interval uses the smaller number of degrees of freedom of the two laws.
    """
    budget = np.array([flops])
    loss = float(grown.loss(budget)[0])
    beyond_grown = flops / grown.flops[1]
    above_floor = loss - scratch.e.value
    if above_floor <= 0:
        return FlopSaving(flops, loss, None, None, None, None, beyond_grown, None)
    log_a, b = scratch.theta[:2]
    log_scratch = (math.log(above_floor) - log_a) / b + scratch.center
    log_ratio = log_scratch - math.log(flops)
    beyond_scratch = _exp(log_scratch) / scratch.flops[1]
    head = flops, loss, _exp(log_scratch), _exp(log_ratio) - 1
    if scratch.covariance is None or grown.covariance is None:
        return FlopSaving(*head, None, None, beyond_grown, beyond_scratch)
    # Gradients of the log ratio with respect to theta of both laws (delta method).
    d_scratch = np.array([-1 / b, -(math.log(above_floor) - log_a) / b**2, -1 / (b * above_floor)])
    d_scratch = d_scratch[: len(scratch.theta)]
    d_grown = grown.gradient(budget)[0] / (b * above_floor)
    variance = d_scratch @ np.array(scratch.covariance) @ d_scratch
    variance += d_grown @ np.array(grown.covariance) @ d_grown
    half_width = math.sqrt(float(variance)) * t_quantile(min(scratch.dof, grown.dof))
    low, high = _exp(log_ratio - half_width) - 1, _exp(log_ratio + half_width) - 1
    return FlopSaving(*head, low, high, beyond_grown, beyond_scratch)


def _fit(data: Data[ScalingPoint], kind: RunKind, floor: bool) -> PowerLaw:
    points = [point for point in data.points if point.kind == kind]
    size = 3 if floor else 2
    budgets = len({point.flops for point in points})
    if budgets < size:
        raise DataError(
            f"{data.source}: {kind} has points at {budgets} different budgets, but fitting {size} "
            f"constants requires {size}" + ("; --no-floor requires 2" if floor else "")
        )
    logs = np.log(np.array([point.flops for point in points], dtype=np.float64))
    losses = np.array([point.loss for point in points], dtype=np.float64)
    solution = least_squares(
        lambda theta: _loss(theta, logs - logs.mean()) - losses,
        _start(logs - logs.mean(), losses, floor),
        jac=lambda theta: _gradient(theta, logs - logs.mean()),
        method="lm",
        x_scale="jac",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
    )
    theta = solution.x
    _check_law(data.source, kind, theta, solution.jac, solution.success)
    law = PowerLaw(
        kind=kind,
        a=Constant(_exp(float(theta[0] - theta[1] * logs.mean()))),
        b=Constant(float(theta[1])),
        e=Constant(float(theta[2]) if floor else 0.0),
        points=len(points),
        flops=(min(point.flops for point in points), max(point.flops for point in points)),
        center=float(logs.mean()),
        theta=tuple(map(float, theta)),
        covariance=None,
    )
    return law if law.dof == 0 else _with_errors(law, solution.jac, 2 * float(solution.cost))


def _with_errors(law: PowerLaw, jacobian: Numbers, squares: float) -> PowerLaw:
    """Add the errors estimated from the residuals to a law."""
    covariance = np.linalg.inv(jacobian.T @ jacobian) * squares / law.dof
    to_origin = np.zeros(len(law.theta))
    to_origin[:2] = 1.0, -law.center
    log_error = math.sqrt(float(to_origin @ covariance @ to_origin))
    log_a = with_interval(law.theta[0] - law.theta[1] * law.center, log_error, law.dof)
    assert log_a.low is not None and log_a.high is not None
    errors = np.sqrt(np.diag(covariance))
    return replace(
        law,
        a=Constant(law.a.value, law.a.value * log_error, _exp(log_a.low), _exp(log_a.high)),
        b=with_interval(law.b.value, float(errors[1]), law.dof),
        e=with_interval(law.e.value, float(errors[2]), law.dof) if len(errors) > 2 else law.e,
        covariance=tuple(tuple(map(float, row)) for row in covariance),
    )


def _exp(exponent: float) -> float:
    """Return exp, or infinity instead of an OverflowError."""
    return math.exp(exponent) if exponent < 700 else math.inf


def _start(z: Numbers, losses: Numbers, floor: bool) -> Numbers:
    """Return the initial theta: the log-log line with the smallest squared residuals.

    One line is fitted for each floor of `FLOORS`.
    """
    best: tuple[float, Numbers] | None = None
    design = np.stack([np.ones_like(z), z], axis=1)
    for e in FLOORS * losses.min() if floor else (0.0,):
        line = fit_linear(design, np.log(losses - e)).values
        theta = np.array([*line, e]) if floor else line
        squares = float(((_loss(theta, z) - losses) ** 2).sum())
        if best is None or squares < best[0]:
            best = squares, theta
    assert best is not None
    return best[1]


def _loss(theta: Numbers, z: Numbers) -> Numbers:
    """Return L (n,) at z = log C - center (n,)."""
    return np.exp(theta[0] + theta[1] * z) + (theta[2] if len(theta) > 2 else 0.0)


def _gradient(theta: Numbers, z: Numbers) -> Numbers:
    """Return the gradient of L with respect to theta, (n, k)."""
    power = np.exp(theta[0] + theta[1] * z)
    return np.stack([power, power * z, np.ones_like(z)][: len(theta)], axis=1)


def _check_law(
    source: str, kind: RunKind, theta: Numbers, jacobian: Numbers, converged: bool
) -> None:
    if theta[1] > MAX_EXPONENT:
        raise DataError(
            f"{source}: the {kind} losses do not decrease as a power of the FLOPs (b = "
            f"{theta[1]:.3g}); use budgets further apart, or more seeds"
        )
    lengths = np.linalg.norm(jacobian, axis=0)
    if not converged or np.linalg.cond(jacobian / lengths) > 1e7:
        raise DataError(
            f"{source}: the {kind} losses do not determine a floor e; add budgets, or use "
            "--no-floor"
        )


def default_budgets(laws: Sequence[PowerLaw]) -> tuple[float, ...]:
    """Return the default budgets of the saving table: the largest of the data and 10 times that."""
    largest = max(law.flops[1] for law in laws)
    return largest, 10 * largest
