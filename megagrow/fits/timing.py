"""When to grow, from one's own runs: the constants of equation 2 of Du et al. 2024 (section 4.2).

    log10 d = a log10 N + b / log10 C + c

d are the base's tokens, N the grown model's parameters outside its embeddings, C the FLOPs of the
budget. The best d of each N and C is a parabola's vertex (`fit_parabola`); the constants follow by
weighted least squares, with intervals of Student's t: the vertices' scatter about the fit tells
their errors.
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
    """The constants of equation 2."""

    a: Constant
    b: Constant
    c: Constant
    residual: float | None
    """Standard deviation of log10 d about the fit, for a vertex of mean weight; None without a
    vertex to spare."""

    def growth_tokens(self, parameters: float, flops: float) -> float:
        """d for a size N and a budget C."""
        log_d = self.a.value * math.log10(parameters) + self.b.value / math.log10(flops)
        return float(10 ** (log_d + self.c.value))


def timing_parabolas(data: Data[IsoPoint]) -> list[Parabola]:
    """Loss over log10 d, for each N and C. Raises InputError where N or C never differs: its
    constant is then not identifiable."""
    _check_spread(data.source, data.points)
    return fit_parabolas(data.points, "d")


def fit_timing(source: str, parabolas: Sequence[Parabola]) -> TimingFit:
    """The constants out of the parabolas that have a best d.

    Raises InputError, which names `source`, where those that are left do not determine them.
    """
    used = accepted(parabolas)
    if len(used) < 3:
        raise DataError(
            f"{source}: {len(used)} of {len(parabolas)} parabolas have a best d, 3 constants need "
            "3; try more d, on both sides of the best"
        )
    _check_spread(source, used)
    design = np.array([[math.log10(p.parameters), 1 / math.log10(p.flops), 1.0] for p in used])
    try:
        fit = fit_best(used, design)
    except ValueError as error:
        raise DataError(
            f"{source}: the sizes and budgets with a best d vary together, so that a and b cannot "
            "be told apart; give a size two budgets"
        ) from error
    residual = None if fit.variance is None else math.sqrt(fit.variance)
    return TimingFit(fit.constant(0), fit.constant(1), fit.constant(2), residual)


def _check_spread(source: str, points: Sequence[IsoPoint] | Sequence[Parabola]) -> None:
    sizes, budgets = {p.parameters for p in points}, {p.flops for p in points}
    if len(sizes) == 1:
        raise DataError(
            f"{source}: only one size, N = {sizes.pop():.4g}, has points to fit: a is not "
            "identifiable; give two sizes or more"
        )
    if len(budgets) == 1:
        raise DataError(
            f"{source}: only one budget, C = {budgets.pop():.4g}, has points to fit: b is not "
            "identifiable; give two budgets or more"
        )
