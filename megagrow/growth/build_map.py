"""From a Depth and a Width to a GrowthMap: the terms and fills of every parameter of the target."""

from dataclasses import dataclass, replace

import numpy as np

from megagrow.config.growth import GrowthConfig, StatePolicy
from megagrow.config.schema import ModelConfig
from megagrow.growth.depth import Depth, Layer
from megagrow.growth.lifts import Lift
from megagrow.growth.map import (
    Axis,
    Dense,
    Fill,
    Fresh,
    Gather,
    GrowthMap,
    ParamScale,
    StateKind,
    Term,
)
from megagrow.growth.tensor_axes import LAST_PROJECTIONS, axis, leaf, strands
from megagrow.growth.width import Width
from megagrow.parallel.sharding import ParamSpec, parameter_plan


@dataclass(frozen=True, eq=False)
class GrowthSpec:
    """Everything that decides a growth map."""

    source: ModelConfig
    target: ModelConfig
    depth: Depth
    width: Width
    options: GrowthConfig
    policy: StatePolicy
    stream: str
    """Names the random numbers of this growth; holds the run's seed."""


def assemble(resolve_operators: GrowthSpec) -> GrowthMap:
    """The map of a growth in depth and width at once; both commute
    (docs/reference/operators.md)."""
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    fresh: dict[str, Fresh] = {}
    for name, spec in parameter_plan(resolve_operators.target, tp=1).items():
        layer = _layer_of(spec, resolve_operators.depth)
        weights[name] = _terms(resolve_operators, spec, layer, moments=False)
        moments[name] = _terms(resolve_operators, spec, layer, moments=True)
        fills[name] = _fills(resolve_operators, spec, layer)
        fresh[name] = _fresh(resolve_operators, spec, layer)
    if resolve_operators.policy in ("asymmetric", "estimate_second_moment"):
        moments = {name: without_fresh(terms, fresh[name]) for name, terms in moments.items()}
    exact = resolve_operators.depth.exact and resolve_operators.width.exact
    return GrowthMap(
        weights,
        moments,
        {name: found for name, found in fills.items() if found},
        kinds_of(resolve_operators.policy),
        preserves_function=exact and resolve_operators.options.mixing_noise == 0,
        provenance=tuple(
            -1 if lay.source is None else lay.source for lay in resolve_operators.depth.layers
        ),
        fresh=fresh,
        scales=_param_scales(resolve_operators),
    )


def _layer_of(spec: ParamSpec, depth: Depth) -> Layer | None:
    return None if spec.layer is None else depth.layers[spec.layer]


def _origin(spec: ParamSpec, layer: int) -> str:
    return spec.name.replace(f"layers.{spec.layer}.", f"layers.{layer}.", 1)


def _terms(
    resolve_operators: GrowthSpec, spec: ParamSpec, layer: Layer | None, moments: bool
) -> tuple[Term, ...]:
    if layer is not None and _nothing_from_source(spec, layer, moments):
        return ()
    width = resolve_operators.width
    rows, cols = strands(spec, resolve_operators.target.tie_word_embeddings)
    along = axis(rows, width, moments), axis(cols, width, moments)
    mixing = resolve_operators.options.mixing_noise
    if mixing and not moments and not spec.is_vector:
        along = _times(along[0], spec.rows, 1 - mixing), along[1]
    if layer is None or layer.source is None:
        return (Gather(spec.name, *along),)
    here = Gather(_origin(spec, layer.source), *along)
    row_lift = width.wires[rows.wire]
    if width.next_layer and row_lift.fresh.any():
        above = min(layer.source + 1, resolve_operators.source.num_hidden_layers - 1)
        there = replace(here, source=_origin(spec, above))
        return _only(here, ~row_lift.fresh), _only(there, row_lift.fresh)
    if width.block_diagonal and not moments and cols is not None:
        return _diagonal(here, row_lift, width.wires[cols.wire])
    return (here,)


def _nothing_from_source(spec: ParamSpec, layer: Layer, moments: bool) -> bool:
    silenced = layer.silent and (moments or leaf(spec) in LAST_PROJECTIONS)
    return layer.source is None or silenced


def _times(along: Axis, size: int, factor: float) -> Axis:
    scale = np.ones(size) if along.scale is None else along.scale
    return Axis(along.index, scale * factor)


def _only(term: Gather, rows: np.ndarray) -> Gather:
    """Those rows of a term whose mask is set."""
    index = np.arange(len(rows)) if term.rows.index is None else term.rows.index
    return replace(term, rows=Axis(np.where(rows, index, -1), term.rows.scale))


def _diagonal(term: Gather, rows: Lift, cols: Lift) -> tuple[Gather, ...]:
    """Copy c of the rows reads copy c of the columns alone, and all of it."""
    copies = int(rows.occurrence.max()) + 1
    if copies == 1 or cols.unchanged:
        return (term,)
    if not cols.occurrence.any():
        raise AssertionError(f"{term.source}: rows and columns have not the same number of copies")
    return tuple(
        Gather(
            term.source,
            Axis(np.where(rows.occurrence == c, rows.index, -1)),
            Axis(np.where(cols.occurrence == c, cols.index, -1)),
        )
        for c in range(copies)
    )


def _fills(resolve_operators: GrowthSpec, spec: ParamSpec, layer: Layer | None) -> tuple[Fill, ...]:
    stream = f"{resolve_operators.stream}/{spec.name}"
    if layer is not None and layer.silent and leaf(spec) in LAST_PROJECTIONS:
        return (Fill(stream),)
    rows, cols = strands(spec, resolve_operators.target.tie_word_embeddings)
    row_lift = resolve_operators.width.wires[rows.wire]
    everything = layer is not None and layer.source is None
    if spec.is_vector:
        new_rows = np.ones(spec.rows, bool) if everything else row_lift.new
        return (Fill(stream, constant=1.0, new_rows=new_rows),) if new_rows.any() else ()
    std = spec.init_std
    if everything:
        return (Fill(stream, std=((std, std), (std, std))),)
    assert cols is not None
    found = []
    keep = 1 - resolve_operators.options.mixing_noise
    col_lift = resolve_operators.width.wires[cols.wire]
    if row_lift.new.any() or col_lift.new.any() or resolve_operators.width.block_diagonal:
        quadrants = _quadrants(resolve_operators.width, row_lift, col_lift, cols.side, std * keep)
        found.append(Fill(stream, quadrants, new_rows=row_lift.new, new_cols=col_lift.new))
    cancelling = resolve_operators.width.noise * std * keep
    if cancelling and cols.side == "consumes" and col_lift.occurrence.any():
        centre = np.where(col_lift.new, -1 - np.arange(col_lift.grown_size), col_lift.index)
        noise = ((cancelling, 0.0), (cancelling, 0.0))
        found.append(Fill(f"{stream}/split", noise, new_cols=col_lift.new, centre=centre))
    if resolve_operators.options.mixing_noise:
        mixed = resolve_operators.options.mixing_noise * _mixing_std(resolve_operators.target, spec)
        found.append(Fill(f"{stream}/mixing", ((mixed, mixed), (mixed, mixed))))
    return tuple(found)


def _quadrants(
    width: Width, rows: Lift, cols: Lift, col_side: str, std: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Standard deviations by (old or new row, old or new column)."""
    if width.literal_zero:
        return (0.0, std if col_side == "consumes" else 0.0), (0.0, std)
    from_new = cols.random_in if col_side == "consumes" else cols.random_out
    return (
        (0.0, std * from_new),
        (std * rows.random_out, std * (rows.random_out and from_new)),
    )


def _mixing_std(target: ModelConfig, spec: ParamSpec) -> float:
    """The paper's appendix I.2: 1 / sqrt(d l^2) for o_proj and down_proj, else sqrt(2 / (5 d))."""
    width, depth = target.hidden_size, target.num_hidden_layers
    return (width * depth**2) ** -0.5 if leaf(spec) in LAST_PROJECTIONS else (0.4 / width) ** 0.5


def _fresh(resolve_operators: GrowthSpec, spec: ParamSpec, layer: Layer | None) -> Fresh:
    rows, cols = strands(spec, resolve_operators.target.tie_word_embeddings)
    masks = [
        lift.fresh if (lift := resolve_operators.width.wires[strand.wire]).fresh.any() else None
        for strand in (rows, cols)
        if strand is not None
    ]
    return Fresh(layer is not None and layer.fresh, *masks)


def _param_scales(resolve_operators: GrowthSpec) -> dict[str, ParamScale]:
    """k_in and k_out of every parameter, if the growth is by even copies in width alone, so that
    the grown model can follow the source exactly (docs/reference/operators.md); else nothing."""
    plan = parameter_plan(resolve_operators.target, tp=1)
    width = resolve_operators.width
    parted = width.block_diagonal or width.next_layer or width.noise > 0
    if resolve_operators.depth.layers != _unchanged_layers(resolve_operators.source) or parted:
        return {}
    if any(lift.factor is None or not lift.lawful for lift in width.wires.values()):
        return {}
    scales = {}
    for name, spec in plan.items():
        k_in = k_out = 1
        for strand in strands(spec, resolve_operators.target.tie_word_embeddings):
            factor = 1 if strand is None else resolve_operators.width.wires[strand.wire].factor or 1
            if strand is not None and strand.side in ("consumes", "tied gain"):
                k_in *= factor
            else:
                k_out *= factor
        scales[name] = ParamScale(1 / k_in, k_in, 1 / k_out, k_out / k_in)
    return scales


def _unchanged_layers(source: ModelConfig) -> tuple[Layer, ...]:
    return tuple(Layer(layer) for layer in range(source.num_hidden_layers))


def kinds_of(policy: StatePolicy) -> tuple[StateKind, ...]:
    """The kinds of state that move."""
    match policy:
        case "reset":
            return ("fp32",)
        case "keep_second_moment":
            return ("fp32", "exp_avg_sq")
        case _:
            return ("fp32", "exp_avg", "exp_avg_sq")


def without_fresh(terms: tuple[Term, ...], fresh: Fresh) -> tuple[Term, ...]:
    """The terms of a parameter's moments for its old entries only."""
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
