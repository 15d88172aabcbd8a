"""Build a GrowthMap from a Depth and a Width: terms and fills of every parameter of the target.

The roles of a parameter's axes come from the parameter table (`model/layers`): it produces the
axis of its rows and consumes the axis of its columns. The embedding produces both, and the gain of
a norm scales the residual stream (docs/reference/operators.md).
"""

from dataclasses import dataclass, replace

import numpy as np

from megagrow.config.growth import GrowthConfig, StatePolicy
from megagrow.config.schema import ModelConfig
from megagrow.growth.depth import Depth, Layer
from megagrow.growth.lifts import Lift
from megagrow.growth.map import (
    SAME,
    Axis,
    Dense,
    Fill,
    Fresh,
    Gather,
    GrowthMap,
    ParamScale,
    Term,
)
from megagrow.growth.width import Width
from megagrow.model.layers.base import AxisRole, AxisSide
from megagrow.parallel.optimizers.rules import ADAMW, Copies, UpdateRule
from megagrow.parallel.sharding import STATE_KINDS, ParamSpec, StateKind, parameter_plan


@dataclass(frozen=True, eq=False)
class GrowthSpec:
    """Inputs that determine a growth map."""

    source: ModelConfig
    target: ModelConfig
    depth: Depth
    width: Width
    options: GrowthConfig
    policy: StatePolicy
    stream: str
    """Name of the random stream of this growth; contains the run's seed."""
    matrices: UpdateRule = ADAMW
    """Optimizer of the matrices of decoder layers in the target."""


def assemble(growth: GrowthSpec) -> GrowthMap:
    """Return the map of a growth in depth and width; the two commute
    (docs/reference/operators.md)."""
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    fresh: dict[str, Fresh] = {}
    for name, spec in parameter_plan(growth.target, tp=1).items():
        layer = _layer_of(spec, growth.depth)
        weights[name] = _terms(growth, spec, layer, moments=False)
        moments[name] = _terms(growth, spec, layer, moments=True)
        fills[name] = _fills(growth, spec, layer)
        fresh[name] = _fresh(growth, spec, layer)
    if growth.policy in ("asymmetric", "estimate_second_moment"):
        moments = {name: without_fresh(terms, fresh[name]) for name, terms in moments.items()}
    exact = growth.depth.exact and growth.width.exact
    unmasked = growth.options.ramp_tokens == 0  # only random operators have the key
    return GrowthMap(
        weights,
        moments,
        {name: found for name, found in fills.items() if found},
        kinds_of(growth.policy),
        preserves_function=exact and growth.options.mixing_noise == 0 and not unmasked,
        provenance=tuple(-1 if lay.source is None else lay.source for lay in growth.depth.layers),
        fresh=fresh,
        scales=_param_scales(growth),
    )


def _layer_of(spec: ParamSpec, depth: Depth) -> Layer | None:
    return None if spec.layer is None else depth.layers[spec.layer]


def _terms(
    growth: GrowthSpec, spec: ParamSpec, layer: Layer | None, moments: bool
) -> tuple[Term, ...]:
    if layer is not None and _nothing_from_source(spec, layer, moments):
        return ()
    width = growth.width
    rows, cols = spec.row_role, spec.col_role
    along = _axis(rows, width, moments), _axis(cols, width, moments)
    mixing = growth.options.mixing_noise
    if mixing and not moments and spec.is_growable_matrix:
        along = _times(along[0], spec.rows, 1 - mixing), along[1]
    if layer is None or layer.source is None:
        return (Gather(spec.name, *along),)
    here = Gather(spec.of_layer(layer.source), *along)
    row_lift = width.lifts[rows.axis.name]
    if width.next_layer and row_lift.fresh.any():
        above = _next_of_type(growth.source, layer.source)
        there = replace(here, source=spec.of_layer(above))
        return _only(here, ~row_lift.fresh), _only(there, row_lift.fresh)
    if width.block_diagonal and not moments and cols is not None:
        return _diagonal(here, row_lift, width.lifts[cols.axis.name])
    return (here,)


def _next_of_type(source: ModelConfig, layer: int) -> int:
    """Return the next layer of the same type, or the layer itself if there is none."""
    later = range(layer + 1, source.num_hidden_layers)
    kind = source.layer_type(layer)
    return next((index for index in later if source.layer_type(index) == kind), layer)


def _axis(role: AxisRole | None, width: Width, moments: bool) -> Axis:
    """Map one axis of the weights, or of a mean of gradients, to the axis of the source."""
    if role is None:
        return SAME
    lift = width.lifts[role.axis.name]
    scale = _scale(role.side, lift, width, moments)
    if lift.unchanged and (scale == 1).all():
        return SAME
    return Axis(lift.index, None if (scale[~lift.new] == 1).all() else scale)


def _scale(side: AxisSide, lift: Lift, width: Width, moments: bool) -> np.ndarray:
    gain, share = width.gain, lift.share / lift.produce
    if moments and not lift.lawful:
        return np.ones(lift.grown_size)
    match side:
        case "produces":
            return share if moments else lift.produce
        case "produces normed":
            # The eps of this norm follows the residual stream: so does the scale of its input.
            return share / width.eps_gain if moments else lift.produce * width.eps_gain
        case "consumes":
            return lift.produce if moments else share
        case "gain":
            return share / gain if moments else np.full(lift.grown_size, gain)
        case "tied gain":
            # The tied head consumes the embedding unscaled: the gain of the final norm divides by
            # the number of copies (docs/reference/operators.md, fix A).
            return np.full(lift.grown_size, 1 / gain) if moments else gain * share


def _nothing_from_source(spec: ParamSpec, layer: Layer, moments: bool) -> bool:
    silenced = layer.silent and (moments or spec.silences)
    return layer.source is None or silenced


def _times(along: Axis, size: int, factor: float) -> Axis:
    scale = np.ones(size) if along.scale is None else along.scale
    return Axis(along.index, scale * factor)


def _only(term: Gather, rows: np.ndarray) -> Gather:
    """Return a term restricted to the rows of a mask."""
    index = np.arange(len(rows)) if term.rows.index is None else term.rows.index
    return replace(term, rows=Axis(np.where(rows, index, -1), term.rows.scale))


def _diagonal(term: Gather, rows: Lift, cols: Lift) -> tuple[Gather, ...]:
    """Return block-diagonal terms: copy c of the rows reads only copy c of the columns."""
    copies = int(rows.occurrence.max()) + 1
    if copies == 1 or cols.unchanged:
        return (term,)
    if not cols.occurrence.any():
        raise AssertionError(f"{term.source}: rows and columns differ in their number of copies")
    return tuple(
        Gather(
            term.source,
            Axis(np.where(rows.occurrence == c, rows.index, -1)),
            Axis(np.where(cols.occurrence == c, cols.index, -1)),
        )
        for c in range(copies)
    )


def _fills(growth: GrowthSpec, spec: ParamSpec, layer: Layer | None) -> tuple[Fill, ...]:
    stream = f"{growth.stream}/{spec.name}"
    if layer is not None and layer.silent and spec.silences:
        return (Fill(stream),)
    rows, cols = spec.row_role, spec.col_role
    row_lift = growth.width.lifts[rows.axis.name]
    everything = layer is not None and layer.source is None
    std = spec.initial.scale
    if everything and spec.initial.distribution == "normal":
        return (Fill(stream, std=((std, std), (std, std))),)
    if everything or cols is None or not spec.is_growable_matrix:
        new_rows = np.ones(spec.rows, bool) if everything else row_lift.new
        fill = Fill(stream, initial=spec.initial, new_rows=new_rows)
        return (fill,) if new_rows.any() else ()
    found = []
    keep = 1 - growth.options.mixing_noise
    col_lift = growth.width.lifts[cols.axis.name]
    if row_lift.new.any() or col_lift.new.any() or growth.width.block_diagonal:
        quadrants = _quadrants(growth.width, row_lift, col_lift, cols.side, std * keep)
        found.append(Fill(stream, quadrants, new_rows=row_lift.new, new_cols=col_lift.new))
    cancelling = growth.width.noise * std * keep
    if cancelling and cols.side == "consumes" and col_lift.occurrence.any():
        center = np.where(col_lift.new, -1 - np.arange(col_lift.grown_size), col_lift.index)
        noise = ((cancelling, 0.0), (cancelling, 0.0))
        found.append(Fill(f"{stream}/split", noise, new_cols=col_lift.new, center=center))
    if growth.options.mixing_noise:
        mixed = growth.options.mixing_noise * _mixing_std(growth.target, spec)
        found.append(Fill(f"{stream}/mixing", ((mixed, mixed), (mixed, mixed))))
    return tuple(found)


def _quadrants(
    width: Width, rows: Lift, cols: Lift, col_side: str, std: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return standard deviations by (old or new row, old or new column)."""
    if width.literal_zero:
        return (0.0, std if col_side == "consumes" else 0.0), (0.0, std)
    from_new = cols.random_in if col_side == "consumes" else cols.random_out
    return (
        (0.0, std * from_new),
        (std * rows.random_out, std * (rows.random_out and from_new)),
    )


def _mixing_std(target: ModelConfig, spec: ParamSpec) -> float:
    """Return the paper's value (appendix I.2): 1 / sqrt(d l^2) for last projections of blocks, else
    sqrt(2 / (5 d))."""
    width, depth = target.hidden_size, target.num_hidden_layers
    return (width * depth**2) ** -0.5 if spec.writes_residual else (0.4 / width) ** 0.5


def _fresh(growth: GrowthSpec, spec: ParamSpec, layer: Layer | None) -> Fresh:
    rows, cols = spec.row_role, spec.col_role
    masks = [
        lift.fresh if (lift := growth.width.lifts[role.axis.name]).fresh.any() else None
        for role in (rows, cols)
        if role is not None
    ]
    return Fresh(layer is not None and layer.fresh, *masks)


def _param_scales(growth: GrowthSpec) -> dict[str, ParamScale]:
    """Return the factors of every parameter if the growth makes even copies in width only.

    With them the grown model follows the source exactly (docs/reference/operators.md). Otherwise
    the result is empty.
    """
    plan = parameter_plan(growth.target, 1, growth.matrices)
    width = growth.width
    splits_copies = width.block_diagonal or width.next_layer or width.noise > 0
    if growth.depth.layers != _unchanged_layers(growth.source) or splits_copies:
        return {}
    if any(lift.factor is None or not lift.lawful for lift in width.lifts.values()):
        return {}
    scales = {}
    for name, spec in plan.items():
        k_in = k_out = 1
        for role in (spec.row_role, spec.col_role):
            factor = 1 if role is None else width.lifts[role.axis.name].factor or 1
            if role is not None and role.side in ("consumes", "tied gain"):
                k_in *= factor
            else:
                k_out *= factor
        rows, cols = spec.rows // k_out, spec.cols // k_in
        scales[name] = spec.rule.continuation(Copies(rows, cols, k_in, k_out))
    return scales


def _unchanged_layers(source: ModelConfig) -> tuple[Layer, ...]:
    return tuple(Layer(layer) for layer in range(source.num_hidden_layers))


def kinds_of(policy: StatePolicy) -> tuple[StateKind, ...]:
    """Return the kinds of state that a policy transfers."""
    match policy:
        case "reset":
            return ("fp32",)
        case "keep_second_moment":
            return ("fp32", "exp_avg_sq")
        case _:
            return STATE_KINDS


def without_fresh(terms: tuple[Term, ...], fresh: Fresh) -> tuple[Term, ...]:
    """Return the terms of a parameter's moments restricted to its old entries."""
    if fresh.whole:
        return ()
    return tuple(term if isinstance(term, Dense) else _old_part(term, fresh) for term in terms)


def _old_part(term: Gather, fresh: Fresh) -> Gather:
    return Gather(term.source, _old(term.rows, fresh.rows), _old(term.cols, fresh.cols))


def _old(along: Axis, fresh: np.ndarray | None) -> Axis:
    if fresh is None:
        return along
    index = np.arange(len(fresh)) if along.index is None else along.index
    return Axis(np.where(fresh, -1, index), along.scale)
