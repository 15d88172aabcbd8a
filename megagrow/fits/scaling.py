"""Loss against compute, from one's own runs: L = a C^b + e, for scratch and for grown.

Fitted by least squares on the losses. Intervals are 95%, of Student's t with the delta method:
errors of the constants from the Jacobian at the solution, those of whatever follows from the
constants by its gradient. The interval of a is made for log a, that of the saving for the log of
the ratio of FLOPs. The band is that of the curve, not of a single run about it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from megagrow.errors import DataError
from megagrow.fits.data import Data, RunKind, ScalingPoint
from megagrow.fits.least_squares import (
    Constant,
    Numbers,
    fit_linear,
    t_reach,
    with_interval,
)

FLOORS = np.concatenate([[0.0], 1.0 - np.geomspace(1.0, 1e-3, 60)[1:]])
"""Shares of the lowest loss that are tried as e to start from."""
FLATTEST = -1e-6
"""A power above this does not fall."""


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """L = a C^b + e, C in FLOPs, L in nats per token."""

    kind: RunKind
    a: Constant
    b: Constant
    e: Constant
    """0 without an error where there is no floor."""
    points: int
    flops: tuple[float, float]
    """The least and the largest budget of the points."""
    centre: float
    """log C about which it was fitted: there the errors of log a and b are independent, nearly."""
    theta: tuple[float, ...]
    """log a at the centre, b, and e unless there is no floor."""
    covariance: tuple[tuple[float, ...], ...] | None
    """Of theta; None without a point to spare."""

    @property
    def freedom(self) -> int:
        """Points less constants."""
        return self.points - len(self.theta)

    def loss(self, flops: Numbers) -> Numbers:
        """L (n,) at budgets (n,)."""
        return _loss(np.array(self.theta), np.log(flops) - self.centre)

    def gradient(self, flops: Numbers) -> Numbers:
        """Of L by theta (n, k)."""
        return _gradient(np.array(self.theta), np.log(flops) - self.centre)

    def band(self, flops: Numbers) -> tuple[Numbers, Numbers] | None:
        """The 95% band of the curve at budgets (n,); None without a point to spare."""
        if self.covariance is None:
            return None
        rows = self.gradient(flops)
        errors = np.sqrt(np.einsum("ni,ij,nj->n", rows, np.array(self.covariance), rows))
        losses, reach = self.loss(flops), errors * t_reach(self.freedom)
        return losses - reach, losses + reach


@dataclass(frozen=True, slots=True)
class FlopSaving:
    """What growing saves at one budget: scratch FLOPs for the same loss / C - 1."""

    flops: float
    """C, the grown run's, its base included."""
    loss: float
    scratch_flops: float | None
    """None where scratch never gets to the loss by its fit: its floor is higher."""
    saving: float | None
    low: float | None
    high: float | None
    beyond_grown: float
    """C over the largest budget of the grown points: above 1 it is extrapolated."""
    beyond_scratch: float | None
    """The same for the scratch FLOPs and points."""


def fit_scaling(data: Data[ScalingPoint], floor: bool = True) -> tuple[PowerLaw, PowerLaw]:
    """The laws of scratch and of grown; e is 0 without `floor`.

    Raises InputError where a kind has fewer different budgets than there are constants, or its
    losses do not fall or do not tell a floor.
    """
    return _fit(data, "scratch", floor), _fit(data, "grown", floor)


def saving_at(scratch: PowerLaw, grown: PowerLaw, flops: float) -> FlopSaving:
    """The saving of growing with `flops`, its interval with the fewer of the degrees of freedom."""
    at = np.array([flops])
    loss = float(grown.loss(at)[0])
    beyond = flops / grown.flops[1]
    above = loss - scratch.e.value
    if above <= 0:
        return FlopSaving(flops, loss, None, None, None, None, beyond, None)
    log_a, b = scratch.theta[:2]
    log_needed = (math.log(above) - log_a) / b + scratch.centre
    ratio = log_needed - math.log(flops)
    further = _exp(log_needed) / scratch.flops[1]
    head = flops, loss, _exp(log_needed), _exp(ratio) - 1
    if scratch.covariance is None or grown.covariance is None:
        return FlopSaving(*head, None, None, beyond, further)
    by_scratch = np.array([-1 / b, -(math.log(above) - log_a) / b**2, -1 / (b * above)])
    by_scratch = by_scratch[: len(scratch.theta)]
    by_grown = grown.gradient(at)[0] / (b * above)
    variance = by_scratch @ np.array(scratch.covariance) @ by_scratch
    variance += by_grown @ np.array(grown.covariance) @ by_grown
    reach = math.sqrt(float(variance)) * t_reach(min(scratch.freedom, grown.freedom))
    low, high = _exp(ratio - reach) - 1, _exp(ratio + reach) - 1
    return FlopSaving(*head, low, high, beyond, further)


def _fit(data: Data[ScalingPoint], kind: RunKind, floor: bool) -> PowerLaw:
    points = [point for point in data.points if point.kind == kind]
    size = 3 if floor else 2
    budgets = len({point.flops for point in points})
    if budgets < size:
        raise DataError(
            f"{data.source}: {kind} has points at {budgets} different budgets, the {size} "
            f"constants need {size}" + ("; --no-floor needs 2" if floor else "")
        )
    logs = np.log(np.array([point.flops for point in points], dtype=np.float64))
    losses = np.array([point.loss for point in points], dtype=np.float64)
    found = least_squares(
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
    theta = found.x
    _check_law(data.source, kind, theta, found.jac, found.success)
    law = PowerLaw(
        kind=kind,
        a=Constant(_exp(float(theta[0] - theta[1] * logs.mean()))),
        b=Constant(float(theta[1])),
        e=Constant(float(theta[2]) if floor else 0.0),
        points=len(points),
        flops=(min(point.flops for point in points), max(point.flops for point in points)),
        centre=float(logs.mean()),
        theta=tuple(map(float, theta)),
        covariance=None,
    )
    return law if law.freedom == 0 else _with_errors(law, found.jac, 2 * float(found.cost))


def _with_errors(law: PowerLaw, jacobian: Numbers, squares: float) -> PowerLaw:
    """The law with what its residuals tell about its errors."""
    covariance = np.linalg.inv(jacobian.T @ jacobian) * squares / law.freedom
    to_origin = np.zeros(len(law.theta))
    to_origin[:2] = 1.0, -law.centre
    log_error = math.sqrt(float(to_origin @ covariance @ to_origin))
    log_a = with_interval(law.theta[0] - law.theta[1] * law.centre, log_error, law.freedom)
    assert log_a.low is not None and log_a.high is not None
    errors = np.sqrt(np.diag(covariance))
    return replace(
        law,
        a=Constant(law.a.value, law.a.value * log_error, _exp(log_a.low), _exp(log_a.high)),
        b=with_interval(law.b.value, float(errors[1]), law.freedom),
        e=with_interval(law.e.value, float(errors[2]), law.freedom) if len(errors) > 2 else law.e,
        covariance=tuple(tuple(map(float, row)) for row in covariance),
    )


def _exp(exponent: float) -> float:
    """Infinite, rather than an error, where it is beyond what a float holds."""
    return math.exp(exponent) if exponent < 700 else math.inf


def _start(z: Numbers, losses: Numbers, floor: bool) -> Numbers:
    """Constants to start from: of all floors tried, the one that leaves the straightest line."""
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
    """L (n,) at log C less the centre (n,)."""
    return np.exp(theta[0] + theta[1] * z) + (theta[2] if len(theta) > 2 else 0.0)


def _gradient(theta: Numbers, z: Numbers) -> Numbers:
    """Of L by theta (n, k)."""
    power = np.exp(theta[0] + theta[1] * z)
    return np.stack([power, power * z, np.ones_like(z)][: len(theta)], axis=1)


def _check_law(
    source: str, kind: RunKind, theta: Numbers, jacobian: Numbers, settled: bool
) -> None:
    if theta[1] > FLATTEST:
        raise DataError(
            f"{source}: the {kind} losses do not fall as a power of the FLOPs (b = "
            f"{theta[1]:.3g}); give budgets further apart, or more seeds"
        )
    lengths = np.linalg.norm(jacobian, axis=0)
    if not settled or np.linalg.cond(jacobian / lengths) > 1e7:
        raise DataError(
            f"{source}: the {kind} losses do not tell a floor e; give more budgets, or --no-floor"
        )


def budgets_shown(laws: Sequence[PowerLaw]) -> tuple[float, ...]:
    """Where the saving is told if no budgets are asked for: the largest one, and 10 times that."""
    largest = max(law.flops[1] for law in laws)
    return largest, 10 * largest
