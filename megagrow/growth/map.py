"""GrowthMap: composition of every parameter of the target model. Pure data, no communication.

A parameter of the target is the sum of its *terms*, which read the source, and of its *fills*,
which do not. A gather reads one source tensor,

    target[i, j] = rows.scale[i] * cols.scale[j] * source[rows.index[i], cols.index[j]],

a dense term is a linear map of full tensors,

    target = sum over k of alpha[k] * left @ (source_k * gain) @ right^T.

Means of gradients (AdamW's exp_avg, Muon's momentum_buffer) have separate terms, and exp_avg_sq
those with every factor squared: if weights are lifted to P_out W P_in^+, gradients become
(P_out^+)^T g P_in^T.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from megagrow.model.layers.base import ZEROS, InitialValues
from megagrow.parallel.optimizers.rules import ParamScale as ParamScale
from megagrow.parallel.sharding import STATE_KINDS, ParamSpec, StateKind, kinds_in

Indices = range | np.ndarray
"""Positions along one axis: a `range` if they are consecutive, else int64 (n,)."""


@dataclass(frozen=True, eq=False)
class Axis:
    """Mapping from an axis of the source to an axis of the target.

    `index` is (n_target,) int64, -1 for entries without a source; None: the same axis. `scale` is
    (n_target,) fp64; None: ones.
    """

    index: np.ndarray | None = None
    scale: np.ndarray | None = None

    @property
    def unchanged(self) -> bool:
        """Return True if the axis is unchanged."""
        return self.index is None and self.scale is None

    def source(self, target: range) -> Indices:
        """Return the source positions of a range of target positions."""
        return target if self.index is None else self.index[target.start : target.stop]

    def squared(self) -> "Axis":
        """Return the axis with its scale squared."""
        return self if self.scale is None else Axis(self.index, self.scale**2)


SAME = Axis()
"""Identity axis."""


@dataclass(frozen=True)
class Gather:
    """Term that selects, repeats and scales rows and columns of one source parameter."""

    source: str
    rows: Axis = SAME
    cols: Axis = SAME

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def squared(self) -> "Gather":
        """Return the term of exp_avg_sq that corresponds to this term of exp_avg."""
        return Gather(self.source, self.rows.squared(), self.cols.squared())


@dataclass(frozen=True, eq=False)
class Dense:
    """Term that combines full source parameters of one shape (rows, cols).

    `left` is (target rows, rows), `right` (target cols, cols), both fp64; None: the identity.
    `gain` names a source vector (cols,) whose weights, to the power of `gain_power`, scale the
    columns first: a norm folded into them. Where the gain is 0, the factor is 0.
    """

    sources: tuple[str, ...]
    alphas: tuple[float, ...]
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    gain: str | None = None
    gain_power: int = 1

    def squared(self) -> "Dense":
        """Return the term of exp_avg_sq.

        Exact where rows of `left` and `right` have one entry each; otherwise mixed entries are
        assumed to be uncorrelated.
        """
        alphas = tuple(alpha**2 for alpha in self.alphas)
        left, right = (None if m is None else m**2 for m in (self.left, self.right))
        return Dense(self.sources, alphas, left, right, self.gain, 2 * self.gain_power)


Term = Gather | Dense


@dataclass(frozen=True, eq=False)
class Fill:
    """Values without a source: initial values of new rows, and normals of mean 0.

    Element (i, j) of the normals depends on `stream` (which holds the seed) and on i * cols + j
    alone. `std` is ((old rows: old, new columns), (new rows: old, new columns)); an axis without
    a mask is all old. `initial` applies to complete new rows.

    Along the columns the normals can be made to vanish on the source's activations: `center`,
    (cols,) int64, labels groups of columns whose normals sum to zero in each row; `basis`,
    (cols, k) with orthonormal columns, spans directions that are projected out of each row.

    A fill of zeros declares that entries without a term are zero.
    """

    stream: str
    std: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))
    initial: InitialValues = ZEROS
    new_rows: np.ndarray | None = None
    new_cols: np.ndarray | None = None
    center: np.ndarray | None = None
    basis: np.ndarray | None = None

    @property
    def is_zero(self) -> bool:
        return not np.any(self.std) and self.initial == ZEROS


@dataclass(frozen=True, eq=False)
class Fresh:
    """New entries of a parameter: all of them, or those of the marked rows and columns.

    The first of several copies of an entry is old, the others are new. Masks are booleans.
    """

    whole: bool = False
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None


@dataclass(frozen=True)
class GrowthMap:
    """Composition of every parameter of the target, and of its optimizer state."""

    weights: Mapping[str, tuple[Term, ...]]
    moments: Mapping[str, tuple[Term, ...]]
    """Terms of means of gradients, and squared of exp_avg_sq; without a term they start at zero."""
    fills: Mapping[str, tuple[Fill, ...]] = field(default_factory=dict)
    """Fills added to the weights; required for entries without a term."""
    kinds: tuple[StateKind, ...] = STATE_KINDS
    """State kinds that are transferred; the others start at zero."""
    preserves_function: bool = False
    """True if the target computes exactly the function of the source."""
    provenance: tuple[int, ...] = ()
    """Source layer of each target layer, -1 for none; recorded in every checkpoint. Empty if
    nothing grew."""
    fresh: Mapping[str, Fresh] = field(default_factory=dict)
    """New entries by parameter; a parameter that is not listed is old."""
    scales: Mapping[str, ParamScale] = field(default_factory=dict)
    """Factors for exact continuation by parameter; 1 for a parameter that is not listed."""

    @property
    def keeps_step(self) -> bool:
        """Return True if Adam's step count is kept, i.e. if moments are transferred."""
        return len(self.kinds) > 1

    def terms(self, name: str, kind: StateKind) -> tuple[Term, ...]:
        """Return the terms of one state kind of a target parameter."""
        if kind not in self.kinds:
            return ()
        if kind == "fp32":
            return self.weights[name]
        found = self.moments.get(name, ())
        return tuple(term.squared() for term in found) if kind == "exp_avg_sq" else found

    def adds(self, name: str) -> bool:
        """Return True if the terms of a parameter's weights are added to fills."""
        return any(not fill.is_zero for fill in self.fills.get(name, ()))

    def with_kinds(self, *kinds: StateKind) -> "GrowthMap":
        """Return the map restricted to some state kinds."""
        return replace(self, kinds=kinds)


def kept_state(
    growth: GrowthMap, source: Mapping[str, ParamSpec], target: Mapping[str, ParamSpec]
) -> GrowthMap:
    """Return the map restricted to the states that the optimizer of the target can continue.

    From AdamW to Muon, the first moments become momentum. From Muon to AdamW, the second moments
    of the matrices are unknown; since Adam's step count is common to all parameters, its state
    starts again for all of them.
    """
    lost = "momentum_buffer" in kinds_in(source) and "momentum_buffer" not in kinds_in(target)
    return growth.with_kinds("fp32") if lost else growth


def identity_map(names: "Mapping[str, object] | list[str]") -> GrowthMap:
    """Return the identity map: with it a growth is a plain reshard."""
    terms: dict[str, tuple[Term, ...]] = {name: (Gather(name),) for name in names}
    return GrowthMap(terms, terms, preserves_function=True)
