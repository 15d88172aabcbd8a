"""Random small models and layouts, for properties that must hold for all of them."""

from hypothesis import strategies as st

from megagrow.config.schema import ModelConfig
from megagrow.parallel.pipeline.split import PipelineSplit
from megagrow.parallel.sharding import ParamSpec, parameter_plan
from megagrow.reshard.layout import Layout

TENSOR_PARALLEL = (1, 2, 4)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any sizes that 4 tensor-parallel ranks can share; the vocabulary may be smaller than 4."""
    kv_heads = 4 * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    return ModelConfig(
        num_hidden_layers=draw(st.integers(1, 3)),
        hidden_size=heads * draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=4 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 23)),
        tie_word_embeddings=draw(st.booleans()),
    )


def layout_of(
    config: ModelConfig,
    zero: int,
    dp: int,
    tp: int,
    decay: str = "all",
    chunks: tuple[int, tuple[int, ...]] | None = None,
) -> Layout:
    """The layout of a model; `decay` is `matrices` where norms have an optimizer group of their
    own; `chunks` are the pipeline ranks and the layers of each chunk."""
    plan = parameter_plan(config, tp)
    split = None if chunks is None else PipelineSplit(*chunks)
    return Layout(plan, groups_of(plan, decay), zero, dp, tp, split)


def groups_of(plan: dict[str, ParamSpec], decay: str) -> tuple[tuple[str, ...], ...]:
    """The optimizer's groups, by the names of parameters."""
    if decay == "all":
        return (tuple(plan),)
    norms = tuple(name for name in plan if "norm" in name)
    return tuple(name for name in plan if name not in norms), norms


@st.composite
def layouts(draw: st.DrawFn, config: ModelConfig) -> Layout:
    """Any layout of a model, on up to 16 ranks."""
    return layout_of(
        config,
        draw(st.integers(0, 3)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(TENSOR_PARALLEL)),
        draw(st.sampled_from(("all", "matrices"))),
        draw(st.none() | pipelines(config.num_hidden_layers)),
    )


@st.composite
def pipelines(draw: st.DrawFn, layers: int) -> tuple[int, tuple[int, ...]]:
    """Pipeline ranks, and the layers of each chunk; chunks without layers occur."""
    ranks = draw(st.integers(2, 3))
    count = ranks * draw(st.integers(1, 2))
    cuts = sorted(draw(st.lists(st.integers(0, layers), min_size=count - 1, max_size=count - 1)))
    ends = zip([0, *cuts], [*cuts, layers], strict=True)
    return ranks, tuple(stop - start for start, stop in ends)
