"""Widthwise growth: operators choose a lift for each wire of the model.

Du et al. 2024, appendix A.3 to A.6, with what makes them exact under RMSNorm, RoPE and grouped
queries: whole key/value groups grow, heads keep their width, and the gain and eps of the norms
follow the residual stream (docs/reference/operators.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.lifts import (
    Lift,
    copied,
    copied_then_padded,
    drawn,
    evenly,
    padded,
    product,
    unchanged,
    unevenly,
)

Wire = Literal["vocab", "residual", "query", "key", "value", "mixed", "ffn"]
"""`mixed` is what o_proj reads: the values after attention."""


@dataclass(frozen=True, eq=False)
class Width:
    """How all wires grow, and what goes with it."""

    wires: dict[Wire, Lift]
    gain: float = 1.0
    """Factor on the gains of the norms, sqrt(c d / d') if P^T P = c I; eps takes its square."""
    exact: bool = True
    scaled_eps: bool = True
    """Whether rms_norm_eps has to follow the gain."""
    literal_zero: bool = False
    """The paper's [[W, A], [0, C]] in every matrix, whatever it produces or consumes."""
    block_diagonal: bool = False
    """Each copy of an output reads its own copy of the inputs (Staged Training)."""
    next_layer: bool = False
    """Copies after the first come from the layer above (bert2BERT's AKI)."""
    noise: float = 0.0
    """Noise on the consumers of copies that cancels in what they compute, relative to the initial
    standard deviation."""


WidthOperator = Callable[[ModelConfig, ModelConfig, GrowthConfig, np.random.Generator], Width]
Lifting = Callable[[int, int], Lift]
"""A wire's old and new size to its lift."""


def model_wires(
    source: ModelConfig, target: ModelConfig, residual: Lifting, inner: Lifting
) -> dict[Wire, Lift]:
    """Lifts of all wires, from one for the residual stream and one for groups and feed-forward.

    A group is one key/value head with its query heads: it grows as a whole
    (docs/reference/operators.md).
    """
    groups = _lift(inner, source.num_key_value_heads, target.num_key_value_heads)
    heads, head = source.num_attention_heads // source.num_key_value_heads, source.head_dim
    keys, queries = product(groups, unchanged(head)), product(groups, unchanged(heads * head))
    return {
        "vocab": unchanged(source.vocab_size),
        "residual": _lift(residual, source.hidden_size, target.hidden_size),
        "query": queries,
        "key": keys,
        "value": keys,
        "mixed": queries,
        "ffn": _lift(inner, source.intermediate_size, target.intermediate_size),
    }


def _lift(make: Lifting, size: int, grown: int) -> Lift:
    return unchanged(size) if size == grown else make(size, grown)


def same_width(source: ModelConfig) -> Width:
    """Nothing grows in width."""
    return Width(model_wires(source, source, _never, _never))


def _never(size: int, grown: int) -> Lift:
    raise AssertionError(f"a wire of {size} was not to grow to {grown}")


def direct_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """The paper's G_direct in width: copies, whose consumers share the weights.

    Exact where the residual stream grows by a whole factor; in interleaved order nothing moves
    between tensor-parallel ranks. The literal form scales the gains by sqrt(d / D) (eq. 8), which
    preserves nothing.
    """

    def make(size: int, grown: int) -> Lift:
        lift = copied(size, grown, options.copy_order)
        return unevenly(lift, generator) if options.copy_split == "uneven" else lift

    wires = model_wires(source, target, make, make)
    whole = target.hidden_size % source.hidden_size == 0
    width = Width(wires, exact=whole, noise=options.noise or 0.0)
    if options.paper_exact:
        gain = (source.hidden_size / target.hidden_size) ** 0.5
        return replace(width, gain=gain, exact=gain == 1, scaled_eps=False)
    return width


def zero_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """The paper's G_zero in width: new residual entries are zero and consumed at random; new
    neurons and heads are random and not consumed yet. Any size; exact with the gain and eps rule.

    The literal form has zeros at the bottom left of every matrix instead (appendix A.4), which
    leaves new neurons without a gradient, and keeps eps.
    """
    residual = partial(padded, random_out=False, random_in=True)
    inner = partial(padded, random_out=True, random_in=False)
    gain = (source.hidden_size / target.hidden_size) ** 0.5
    width = Width(model_wires(source, target, residual, inner), gain)
    if options.paper_exact:
        return replace(width, literal_zero=True, scaled_eps=False, exact=gain == 1)
    return width


def random_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """The paper's G_random in width (MSG): all that is new is random, behind masks in the running
    model that rise from 0 to 1. Exact at mask 0."""
    make = partial(padded, random_out=True, random_in=True)
    return Width(model_wires(source, target, make, make))


def net2net_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Net2Net (Chen et al. 2016): new entries are random picks of old ones, consumers divided by
    the number of copies. Exact where the residual stream grows by a whole factor."""
    make = partial(drawn, generator=generator)
    whole = target.hidden_size % source.hidden_size == 0
    wires = model_wires(source, target, make, make)
    return Width(wires, exact=whole, noise=options.noise or 0.0)


def staged_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Staged Training (Shen et al. 2022): the model twice beside itself, block by block. Exact.

    Its moments are those of all blocks, also of the empty ones, whose gradients are the same.
    """
    return replace(direct_width(source, target, options, generator), block_diagonal=True)


def bert2bert_fpi(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """bert2BERT's function-preserving initialisation (Chen et al. 2022): the wires repeated from
    the front. Exact where the residual stream grows by a whole factor."""
    make = partial(copied, order="tiled")
    whole = target.hidden_size % source.hidden_size == 0
    return Width(model_wires(source, target, make, make), exact=whole)


def bert2bert_aki(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """bert2BERT's advanced knowledge initialisation: as FPI, but the copies come from the layer
    above. Not exact."""
    width = bert2bert_fpi(source, target, options, generator)
    return replace(width, next_layer=True, exact=False)


def lemon(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """LEMON (Wang et al. 2024): circular copies whose consumers differ by random parts that cancel
    (its projection split), and a zero residue of the residual stream. Any size; exact."""
    wires = model_wires(source, target, copied_then_padded, partial(copied, order="tiled"))
    whole = target.hidden_size // source.hidden_size
    gain = (whole * source.hidden_size / target.hidden_size) ** 0.5
    return Width(wires, gain, noise=1.0 if options.noise is None else options.noise)


def hypercloning(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """HyperCloning (Samragh et al. 2024): whole factors, tiled, with noise that cancels. Exact."""
    width = bert2bert_fpi(source, target, options, generator)
    return replace(width, noise=0.1 if options.noise is None else options.noise)


def sparkling(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """SPARKLING (arXiv 2602.02472, section 3): copies, scaled so that the RMS of what each matrix
    gives is kept: 1 / sqrt(1 + 3c) for a share c <= 1 of copied inputs, 1 / (1 + c) above. With
    `new_layer_init: random` new entries are random, and the factor is sqrt(d_in / d_in').

    Near to preserving, and exact for whole factors of copies. Moments move unscaled.
    """
    make = _copied_by_rms if options.new_layer_init == "copy" else _random_by_rms
    wires = model_wires(source, target, make, make)
    whole = all(lift.grown_size % lift.size == 0 for lift in wires.values())
    return Width(wires, exact=whole and options.new_layer_init == "copy", scaled_eps=False)


def _copied_by_rms(size: int, grown: int) -> Lift:
    lift, c = evenly(size, np.arange(grown) % size), grown / size - 1
    factor = (1 + 3 * c) ** -0.5 if c <= 1 else 1 / (1 + c)
    return replace(lift, share=np.full(grown, factor), lawful=False)


def _random_by_rms(size: int, grown: int) -> Lift:
    lift = padded(size, grown, random_out=True, random_in=True)
    return replace(lift, share=np.full(grown, (size / grown) ** 0.5), lawful=False)


def head_dim(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Wider heads under RoPE, by a whole factor r: the pair of frequency i goes to pair r i, keys
    are scaled by sqrt(r), new keys and new columns of o_proj are zero. Exact."""
    old, new = source.head_dim, target.head_dim
    pairs = np.full(new // 2, -1)
    pairs[:: new // old] = np.arange(old // 2)
    turned = np.concatenate([pairs, np.where(pairs < 0, -1, pairs + old // 2)])
    query = replace(evenly(old, turned), random_out=True)
    key = replace(evenly(old, turned), produce=np.full(new, (new / old) ** 0.5))
    value = padded(old, new, random_out=True, random_in=False)
    kv_heads, heads = source.num_key_value_heads, source.num_attention_heads
    wires = same_width(source).wires | {
        "query": product(unchanged(heads), query),
        "key": product(unchanged(kv_heads), key),
        "value": product(unchanged(kv_heads), value),
        "mixed": product(unchanged(heads), value),
    }
    return Width(wires)


def vocabulary(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """New tokens at the end of the vocabulary, with initial weights. The logits of the old tokens
    are exactly kept; the softmax is over more."""
    lift = padded(source.vocab_size, target.vocab_size, random_out=True, random_in=False)
    wires = same_width(source).wires | {"vocab": lift}
    return Width(wires, exact=source.vocab_size == target.vocab_size)


def isometric(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """The residual stream of an isometric growth, as far as sizes, gain and eps are concerned; the
    turning is added by `growth/isometric.py`."""
    residual = partial(padded, random_out=False, random_in=True)
    gain = (source.hidden_size / target.hidden_size) ** 0.5
    return Width(model_wires(source, target, residual, _never), gain)
