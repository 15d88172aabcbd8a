"""Growth timing fitted to runs: constants of equation 2 of Du et al. 2024 (section 4.2).

    log10 d = a log10 N + b / log10 C + c

d is the number of training tokens of the base, N the number of non-embedding parameters of the
grown model, C the FLOP budget. The best d of each N and C is the vertex of a parabola
(`fits.parabola`). The constants are fitted by weighted least squares, with Student's t intervals
estimated from the scatter of the vertices about the fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagrow.config.growth_guidelines import A, B, C
from megagrow.errors import DataError
from megagrow.fits.data import Data, IsoPoint
from megagrow.fits.least_squares import Constant
from megagrow.fits.parabola import Parabola, accepted, fit_best, fit_parabolas

PAPER = {"a": A, "b": B, "c": C}


@dataclass(frozen=True, slots=True)
class TimingFit:
    """Fitted constants of equation 2."""

    a: Constant
    b: Constant
    c: Constant
    residual: float | None
    """Standard deviation of log10 d about the fit for a vertex of mean weight.

    None without degrees of freedom.
    """

    def growth_tokens(self, parameters: float, flops: float) -> float:
        """Return d, in tokens, for N non-embedding parameters and a budget of C FLOPs."""
        log_d = self.a.value * math.log10(parameters) + self.b.value / math.log10(flops)
        return float(10 ** (log_d + self.c.value))


def timing_parabolas(data: Data[IsoPoint]) -> list[Parabola]:
    """Fit a parabola of the loss over log10 d for each N and C.

    Raises InputError if all points have the same N or the same C: its constant is then not
    identifiable.
    """
    _check_spread(data.source, data.points)
    return fit_parabolas(data.points, "d")


def fit_timing(source: str, parabolas: Sequence[Parabola]) -> TimingFit:
    """Fit the constants to the parabolas with a best d.

    Raises InputError, with `source` in the message, if these do not determine the constants.
    """
    used = accepted(parabolas)
    if len(used) < 3:
        raise DataError(
            f"{source}: {len(used)} of {len(parabolas)} parabolas have a best d, but fitting 3 "
            "constants requires 3; add runs with other d, on both sides of the best"
        )
    _check_spread(source, used)
    design = np.array([[math.log10(p.parameters), 1 / math.log10(p.flops), 1.0] for p in used])
    try:
        fit = fit_best(used, design)
    except ValueError as error:
        raise DataError(
            f"{source}: sizes and budgets with a best d vary together, so a and b are not "
            "identifiable; use two budgets for one size"
        ) from error
    residual = None if fit.variance is None else math.sqrt(fit.variance)
    return TimingFit(fit.constant(0), fit.constant(1), fit.constant(2), residual)


def _check_spread(source: str, points: Sequence[IsoPoint] | Sequence[Parabola]) -> None:
    sizes, budgets = {p.parameters for p in points}, {p.flops for p in points}
    if len(sizes) == 1:
        raise DataError(
            f"{source}: only one size, N = {sizes.pop():.4g}, has points to fit, so a is not "
            "identifiable; use at least two sizes"
        )
    if len(budgets) == 1:
        raise DataError(
            f"{source}: only one budget, C = {budgets.pop():.4g}, has points to fit, so b is not "
            "identifiable; use at least two budgets"
        )
