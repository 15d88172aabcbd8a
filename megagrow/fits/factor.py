"""How much to grow by, from one's own runs: the factor g of the least loss at equal FLOPs.

The best g of each size and budget is the vertex of a parabola in log10 g (`fit_parabola`). The
paper found no law in them worth using and recommends one g for all (section 4.2): so does this, by
the weighted mean of log10 g, with an interval of Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagrow.errors import DataError
from megagrow.fits.data import Data, IsoPoint
from megagrow.fits.least_squares import Constant
from megagrow.fits.parabola import Parabola, accepted, fit_best, fit_parabolas

PAPER_BEST = (2.0, 4.0)
"""Where the paper's optimum lies; it recommends 4."""


@dataclass(frozen=True, slots=True)
class FactorFit:
    """The recommended growth factor."""

    log10_factor: Constant
    factor: float
    low: float | None
    """Of the 95% interval; None with one vertex only."""
    high: float | None
    nearest_tried: float
    """The factor among those tried that is nearest to it, on the log axis."""


def factor_parabolas(data: Data[IsoPoint]) -> list[Parabola]:
    """Loss over log10 g, for each N and C."""
    return fit_parabolas(data.points, "g")


def fit_factor(data: Data[IsoPoint], parabolas: Sequence[Parabola]) -> FactorFit:
    """One g out of the parabolas that have a best one. Raises InputError where none has."""
    used = accepted(parabolas)
    if not used:
        raise DataError(
            f"{data.source}: no parabola has a best g ({parabolas[0].refused}); try more g"
            if parabolas
            else f"{data.source}: no growth factor above 1; give at least 3"
        )
    mean = fit_best(used, np.ones((len(used), 1))).constant(0)
    low, high = (None if end is None else 10**end for end in (mean.low, mean.high))
    tried = sorted({point.choice for point in data.points})
    nearest = min(tried, key=lambda g: abs(np.log10(g) - mean.value))
    return FactorFit(mean, 10**mean.value, low, high, nearest)
