"""Random growth maps: stacks of layers, and gathers along every axis with scales and fills."""

import numpy as np
from hypothesis import strategies as st

from megagrow.config.schema import ModelConfig
from megagrow.growth.map import Axis, Fill, Gather, GrowthMap, Term
from megagrow.model.layers.base import ONES, ZEROS, InitialValues
from megagrow.parallel.sharding import ParamSpec, parameter_plan

Lifts = dict[tuple, Axis]


@st.composite
def stacks(draw: st.DrawFn, source: ModelConfig) -> tuple[ModelConfig, GrowthMap]:
    """A deeper (or shallower) model, each layer a copy of any layer of the source."""
    depth = source.num_hidden_layers
    layers = draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=5))
    target = source.model_copy(update={"num_hidden_layers": len(layers)})
    terms: dict[str, tuple[Term, ...]] = {
        name: (Gather(_origin(spec, layers)),) for name, spec in parameter_plan(target, 1).items()
    }
    return target, GrowthMap(terms, terms, provenance=tuple(layers))


@st.composite
def widenings(
    draw: st.DrawFn, source: ModelConfig, target: ModelConfig
) -> tuple[ModelConfig, GrowthMap]:
    """A model of quite other sizes: every axis lists the source positions that it repeats, or
    takes nothing. Some parameters come from two layers, and some are also filled."""
    tied = {"tie_word_embeddings": source.tie_word_embeddings}
    target = target.model_copy(update=tied)
    depth = source.num_hidden_layers
    layers = [draw(st.integers(0, depth - 1)) for _ in range(target.num_hidden_layers)]
    before, after = parameter_plan(source, 1), parameter_plan(target, 1)
    lifts: Lifts = {}
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    for name, spec in after.items():
        origin = before[_origin(spec, layers)]
        other = _origin(spec, [draw(st.integers(0, depth - 1))] * len(layers))
        rows = _axis(draw, lifts, spec.row_role.axis.name, origin.rows, spec.rows)
        column_axis = "none" if spec.col_role is None else spec.col_role.axis.name
        cols = _axis(draw, lifts, column_axis, origin.cols, spec.cols)
        weights[name] = _gathers(draw, origin.name, other, rows, cols)
        # Moments have scales of their own.
        moments[name] = draw(
            st.sampled_from(
                [(), weights[name], (Gather(other, Axis(rows.index), Axis(cols.index)),)]
            )
        )
        if draw(st.integers(0, 3)) == 0:
            fills[name] = (draw(fills_of(name, spec, projected=False)),)
    return target, GrowthMap(weights, moments, fills, provenance=tuple(layers))


def _gathers(
    draw: st.DrawFn, origin: str, other: str, rows: Axis, cols: Axis
) -> tuple[Gather, ...]:
    """One gather, or two that share out the rows, or none."""
    how = draw(st.sampled_from(["one", "one", "two", "none"]))
    if how == "none":
        return ()
    if how == "two" and rows.index is not None:
        first = np.arange(len(rows.index)) % 3 > 0
        one = Axis(np.where(first, rows.index, -1), rows.scale)
        return Gather(origin, one, cols), Gather(other, Axis(np.where(first, -1, rows.index)), cols)
    return (Gather(origin, rows, cols),)


def _axis(draw: st.DrawFn, lifts: Lifts, name: str, old: int, new: int) -> Axis:
    """Return one lift for all tensor axes of an activation axis."""
    if (name, old, new) not in lifts:
        lifts[name, old, new] = draw(axes_of(old, new))
    return lifts[name, old, new]


@st.composite
def axes_of(draw: st.DrawFn, old: int, new: int) -> Axis:
    """A lift of an axis: copies side by side, interleaved or anyhow, with or without scales."""
    kinds = ["tiled", "interleaved", "anyhow", "padded"] + (["unchanged"] if old == new else [])
    kind = draw(st.sampled_from(kinds))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale = None
    if draw(st.booleans()):
        # Powers of two: products are exact in any order.
        scale = 2.0 ** generator.integers(-3, 2, new)
    index = {
        "tiled": np.arange(new) % old,
        "interleaved": np.arange(new) * old // new,
        "anyhow": generator.integers(-1, old, size=new),
        "padded": np.where(np.arange(new) < old, np.arange(new), -1),
        "unchanged": None,
    }[kind]
    return Axis(index, scale)


INITIAL = (ZEROS, ONES, InitialValues("uniform", 0.5), InitialValues("log of column"))


@st.composite
def fills_of(draw: st.DrawFn, stream: str, spec: ParamSpec, projected: bool) -> Fill:
    """A fill with any of its parts; `projected`: whether its normals may vanish on directions."""
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    stds = st.sampled_from([0.0, 0.5, 1.0])
    quadrants = ((draw(stds), draw(stds)), (draw(stds), draw(stds)))
    new_rows, new_cols = (
        generator.random(size) < 0.5 if draw(st.booleans()) else None
        for size in (spec.rows, spec.cols)
    )
    center = basis = None
    if projected and draw(st.booleans()):
        center = generator.integers(-1, 1 + spec.cols // 2, spec.cols)
    if projected and draw(st.booleans()) and spec.cols > 1:
        basis = np.linalg.qr(generator.standard_normal((spec.cols, spec.cols // 2)))[0]
    initial = draw(st.sampled_from(INITIAL))
    return Fill(stream, quadrants, initial, new_rows, new_cols, center, basis)


def _origin(spec: ParamSpec, layers: list[int]) -> str:
    if spec.layer is None:
        return spec.name
    head, tail = "model.layers.", spec.name.split(".", 3)[3]
    return f"{head}{layers[spec.layer]}.{tail}"
