"""Growth factor fitted to runs: the g with the lowest loss at equal FLOPs.

The best g of each size and budget is the vertex of a parabola in log10 g (`fits.parabola`). The
paper found no useful law for them and recommends one g for all (section 4.2). Likewise, one g is
fitted here as the weighted mean of log10 g, with a Student's t interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagrow.errors import DataError
from megagrow.fits.data import Data, IsoPoint
from megagrow.fits.least_squares import Constant
from megagrow.fits.parabola import Parabola, accepted, fit_best, fit_parabolas

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
