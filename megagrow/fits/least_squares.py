"""Linear least squares and the intervals of what was fitted."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lstsq
from scipy.stats import t as student_t

Numbers = NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Constant:
    """A fitted number with its standard error and 95% interval.

    None where there were only as many points as constants, so that nothing tells the error.
    """

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class LinearFit:
    """y = X beta by weighted least squares."""

    values: Numbers
    """beta (k,)."""
    unit_covariance: Numbers
    """Of beta (k, k), if a point of weight 1 has an error of variance 1."""
    squares: float
    """The weighted sum of squared residuals."""
    freedom: int
    """Points less constants."""

    @property
    def variance(self) -> float | None:
        """Of the error of a point of weight 1, as the residuals tell it."""
        return self.squares / self.freedom if self.freedom else None

    def constant(self, index: int) -> Constant:
        """One of the values with its interval."""
        if self.variance is None:
            return Constant(float(self.values[index]))
        error = float(np.sqrt(self.variance * self.unit_covariance[index, index]))
        return with_interval(float(self.values[index]), error, self.freedom)


def fit_linear(design: Numbers, seen: Numbers, weights: Numbers | None = None) -> LinearFit:
    """Fits `seen` (n,) = `design` (n, k) @ beta; `weights` (n,) are inverse variances, up to a
    factor, and all 1 where none are given.

    Raises ValueError where the columns depend on each other: beta is then not identifiable.
    """
    root = np.sqrt(np.ones(len(seen)) if weights is None else weights)
    scaled = design * root[:, None]
    # Columns of equal length: the rank is then that of the problem, not of its units.
    lengths = np.sqrt((scaled**2).sum(axis=0))
    if not (lengths > 0).all():
        raise ValueError("a column is zero")
    scaled = scaled / lengths
    values, _, rank, _ = lstsq(scaled, seen * root, cond=1e-10)
    if rank < design.shape[1]:
        raise ValueError("the columns depend on each other")
    covariance = np.linalg.inv(scaled.T @ scaled) / np.outer(lengths, lengths)
    residuals = seen * root - scaled @ values
    freedom = len(seen) - design.shape[1]
    return LinearFit(values / lengths, covariance, float(residuals @ residuals), freedom)


def with_interval(value: float, error: float, freedom: int) -> Constant:
    """`value` with the 95% interval of Student's t for `freedom` degrees of freedom."""
    reach = error * t_reach(freedom)
    return Constant(value, error, value - reach, value + reach)


def t_reach(freedom: int) -> float:
    """How many standard errors a 95% interval reaches to each side."""
    return float(student_t.ppf(0.5 + CONFIDENCE / 2, freedom))
