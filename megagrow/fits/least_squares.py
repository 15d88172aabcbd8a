"""Linear least squares with confidence intervals of the fitted constants."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lstsq

from megagrow.analysis.growth_transient import t_quantile

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Constant:
    """Fitted constant with standard error and 95% interval.

    Error and interval are None if there are no degrees of freedom left to estimate them.
    """

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class LinearFit:
    """Weighted least-squares solution of y = X beta."""

    values: Numbers
    """beta, (k,) float64."""
    unit_covariance: Numbers
    """Covariance of beta, (k, k) float64, for error variance 1 of a point of weight 1."""
    squares: float
    """Weighted sum of squared residuals."""
    dof: int
    """Degrees of freedom: number of points minus number of constants."""

    @property
    def variance(self) -> float | None:
        """Error variance of a point of weight 1, from the residuals; None if `dof` is 0."""
        return self.squares / self.dof if self.dof else None

    def constant(self, index: int) -> Constant:
        """Return `values[index]` with its interval."""
        if self.variance is None:
            return Constant(float(self.values[index]))
        error = float(np.sqrt(self.variance * self.unit_covariance[index, index]))
        return with_interval(float(self.values[index]), error, self.dof)


def fit_linear(design: Numbers, observed: Numbers, weights: Numbers | None = None) -> LinearFit:
    """Fit `observed` (n,) = `design` (n, k) @ beta.

    `weights` (n,) are inverse variances up to a common factor; the default is 1 for all points.
    Raises ValueError if the columns are linearly dependent, so that beta is not identifiable.
    """
    root = np.sqrt(np.ones(len(observed)) if weights is None else weights)
    scaled = design * root[:, None]
    # Normalized columns make the numerical rank independent of the units.
    lengths = np.sqrt((scaled**2).sum(axis=0))
    if not (lengths > 0).all():
        raise ValueError("a column is zero")
    scaled = scaled / lengths
    values, _, rank, _ = lstsq(scaled, observed * root, cond=1e-10)
    if rank < design.shape[1]:
        raise ValueError("the columns are linearly dependent")
    covariance = np.linalg.inv(scaled.T @ scaled) / np.outer(lengths, lengths)
    residuals = observed * root - scaled @ values
    dof = len(observed) - design.shape[1]
    return LinearFit(values / lengths, covariance, float(residuals @ residuals), dof)


def with_interval(value: float, error: float, dof: int) -> Constant:
    """Return `value` with the 95% interval of Student's t for `dof` degrees of freedom."""
    half_width = error * t_quantile(dof)
    return Constant(value, error, value - half_width, value + half_width)
