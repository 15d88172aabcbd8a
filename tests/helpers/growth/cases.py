"""Random growths that a run may ask for: a source, a target and the options of each operator."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from megagrow.config.growth import OperatorName
from megagrow.config.schema import ModelConfig
from megagrow.growth.operators import OPERATORS
from tools.docs.operators.cases import GrowthCase as Case
from tools.docs.operators.cases import Sizes, times, widened
from tools.docs.operators.cases import growth_case as case

EXACT: tuple[OperatorName, ...] = (
    *("direct_width", "learn_width", "zero_width", "net2net_width", "staged_width"),
    *("bert2bert_fpi", "lemon", "hypercloning", "mup_copy", "isometric", "head_dim"),
    *("zero_depth", "learn_depth", "llama_pro"),
)
"""These preserve the function, whatever the sizes that they take."""

MASKED: tuple[OperatorName, ...] = ("random_depth", "random_width")
"""These do while the masks of their new parts are 0."""

CHANGES: tuple[OperatorName, ...] = (
    *("direct_depth", "solar", "mslt", "midas", "lidas", "bert2bert_aki"),
)
"""These do not."""


@st.composite
def sources(draw: st.DrawFn, tied: bool | None = None, layers: int | None = None) -> ModelConfig:
    """Any small model: one or several kv heads of one or several queries, a large norm eps."""
    kv_heads = draw(st.integers(1, 3))
    return ModelConfig(
        num_hidden_layers=layers or draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(3, 9)),
        num_attention_heads=kv_heads * draw(st.sampled_from((1, 2, 4))),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from((2, 4))),
        intermediate_size=draw(st.integers(2, 7)),
        vocab_size=draw(st.integers(5, 11)),
        max_position_embeddings=64,
        rope_theta=100.0,
        rms_norm_eps=draw(st.sampled_from((1e-5, 1e-2, 0.3))),
        tie_word_embeddings=draw(st.booleans()) if tied is None else tied,
    )


Draw = Callable[[st.DrawFn, ModelConfig], tuple[Sizes, Sizes]]
"""A source to the fields of a target, and options besides the operator."""


def _whole(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    factors = st.integers(1, 3)
    return times(source, draw(factors), draw(factors), draw(factors)), {}


def _whole_residual(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    residual = source.hidden_size * draw(st.integers(1, 3))
    return _inner(draw, source) | {"hidden_size": residual}, {}


def _inner(draw: st.DrawFn, source: ModelConfig) -> Sizes:
    groups, ffn = source.num_key_value_heads, source.intermediate_size
    any_groups, any_ffn = draw(st.integers(groups, 3 * groups)), draw(st.integers(ffn, 3 * ffn))
    return widened(source, source.hidden_size, any_groups, any_ffn)


def _any(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    width = source.hidden_size
    return _inner(draw, source) | {"hidden_size": draw(st.integers(width, 3 * width))}, {}


def _direct_width(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    options = {
        "copy_order": draw(st.sampled_from(("interleaved", "tiled"))),
        "copy_split": draw(st.sampled_from(("even", "uneven"))),
        "noise": draw(st.sampled_from((None, 3.0))),
    }
    return _whole_residual(draw, source)[0], options


def _head_dim(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    return {"head_dim": source.head_dim * draw(st.integers(1, 3))}, {}


def _vocabulary(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    return {"vocab_size": source.vocab_size + draw(st.integers(1, 5))}, {}


def _isometric(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    return {"hidden_size": source.hidden_size + draw(st.integers(0, 6))}, {}


def _direct_depth(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    layers = st.integers(0, source.num_hidden_layers - 1)
    chosen = draw(st.lists(layers, min_size=1, max_size=6))
    return {"num_hidden_layers": len(chosen)}, {"layer_map": chosen}


def _zero_depth(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
    old = source.num_hidden_layers
    options: Sizes = {"new_layer_init": draw(st.sampled_from(("copy", "random")))}
    if draw(st.booleans()):
        return {"num_hidden_layers": draw(st.integers(old, 6))}, options
    listed: list[int] = []
    for layer in range(old):
        listed += [layer, *draw(st.lists(st.integers(0, layer), max_size=2))]
    return {"num_hidden_layers": len(listed)}, options | {"layer_map": listed}


def _deeper(sizes: Callable[[int], list[int]]) -> Draw:
    def choose(draw: st.DrawFn, source: ModelConfig) -> tuple[Sizes, Sizes]:
        return {"num_hidden_layers": draw(st.sampled_from(sizes(source.num_hidden_layers)))}, {}

    return choose


def _parts(old: int) -> list[int]:
    return [old + new for new in range(1, old + 1) if old % new == 0]


_DRAWS: dict[OperatorName, Draw] = {
    "direct_depth": _direct_depth,
    "zero_depth": _zero_depth,
    "learn_depth": _zero_depth,
    "random_depth": _deeper(lambda old: list(range(old, old + 4))),
    "solar": _deeper(lambda old: [new for new in range(old, 2 * old + 1) if new % 2 == 0]),
    "llama_pro": _deeper(_parts),
    "mslt": _deeper(lambda old: list(range(old + 1, 2 * old + 1))),
    "midas": _deeper(_parts),
    "lidas": _deeper(lambda old: [new for new in _parts(old) if new < 2 * old]),
    "direct_width": _direct_width,
    "learn_width": _direct_width,
    "net2net_width": _whole_residual,
    "bert2bert_fpi": _whole_residual,
    "bert2bert_aki": _whole_residual,
    "hypercloning": _whole,
    "mup_copy": _whole,
    "staged_width": lambda draw, source: (times(source, 2, 2, 2), {}),
    "zero_width": _any,
    "random_width": _any,
    "lemon": _any,
    "sparkling": _any,
    "isometric": _isometric,
    "head_dim": _head_dim,
    "vocabulary": _vocabulary,
}


@st.composite
def cases(draw: st.DrawFn, *operators: OperatorName, source: Any = None, **options: Any) -> Case:
    """Any growth by one operator, or by one of depth and one of width together."""
    if source is None:
        tied = False if "isometric" in operators else None
        layers = draw(st.integers(2, 3)) if "lidas" in operators else None
        source = draw(sources(tied, layers))
    sizes: Sizes = {}
    for name in operators:
        target, chosen = _DRAWS[name](draw, source)
        sizes, options = sizes | target, chosen | options
    if len(operators) > 1:
        options["exact_continuation"] = False  # copies in width alone can be followed
    return case(source, sizes, operator=list(operators), **options)


def covers_all_operators() -> bool:
    """Return True if every operator of the table can be drawn."""
    return _DRAWS.keys() == OPERATORS.keys()
