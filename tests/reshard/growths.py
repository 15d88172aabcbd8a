"""Random growth maps: stacks of layers, and gathers along every axis with scales."""

import numpy as np
from hypothesis import strategies as st

from megagrow.config.schema import ModelConfig
from megagrow.growth.map import Axis, Gather, GrowthMap
from megagrow.parallel.plan import ParamSpec, parameter_plan


@st.composite
def stacks(draw: st.DrawFn, source: ModelConfig) -> tuple[ModelConfig, GrowthMap]:
    """A deeper (or shallower) model, each layer a copy of any layer of the source."""
    depth = source.num_hidden_layers
    layers = draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=5))
    target = source.model_copy(update={"num_hidden_layers": len(layers)})
    terms = {
        name: Gather(_origin(spec, layers)) for name, spec in parameter_plan(target, 1).items()
    }
    return target, GrowthMap(terms, "transport", False, tuple(layers))


@st.composite
def widenings(
    draw: st.DrawFn, source: ModelConfig, target: ModelConfig
) -> tuple[ModelConfig, GrowthMap]:
    """A model of quite other sizes: every axis lists the source positions that it repeats."""
    tied = {"tie_word_embeddings": source.tie_word_embeddings}
    target = target.model_copy(update=tied)
    depth = source.num_hidden_layers
    layers = [draw(st.integers(0, depth - 1)) for _ in range(target.num_hidden_layers)]
    before, after = parameter_plan(source, 1), parameter_plan(target, 1)
    lifts: dict[tuple, Axis] = {}
    terms = {}
    for name, spec in after.items():
        origin = before[_origin(spec, layers)]
        axes = []
        sides = (spec.row_role, origin.rows, spec.rows), (spec.col_role, origin.cols, spec.cols)
        for side, (role, old, new) in zip(("producer", "consumer"), sides, strict=True):
            if (role, side, old, new) not in lifts:
                lifts[role, side, old, new] = draw(axes_of(old, new))
            axes.append(lifts[role, side, old, new])
        terms[name] = Gather(origin.name, *axes)
    return target, GrowthMap(terms, "transport", False, tuple(layers))


@st.composite
def axes_of(draw: st.DrawFn, old: int, new: int) -> Axis:
    """A lift of an axis: copies side by side, interleaved or anyhow, with or without scales."""
    kinds = ["tiled", "interleaved", "anyhow"] + (["unchanged"] if old == new else [])
    kind = draw(st.sampled_from(kinds))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    scales = [None, None]
    for which in range(2):
        if draw(st.booleans()):
            # Powers of two: products are exact in any order.
            scales[which] = np.float32(2.0) ** generator.integers(-3, 2, new).astype(np.float32)
    index = {
        "tiled": np.arange(new) % old,
        "interleaved": np.arange(new) * old // new,
        "anyhow": generator.integers(old, size=new),
        "unchanged": None,
    }[kind]
    return Axis(index, *scales)


def _origin(spec: ParamSpec, layers: list[int]) -> str:
    if spec.layer is None:
        return spec.name
    head, tail = "model.layers.", spec.name.split(".", 3)[3]
    return f"{head}{layers[spec.layer]}.{tail}"
