"""Width growth: operators choose a lift for each activation axis of the model.

Du et al. 2024, appendix A.3 to A.6, with corrections that make the operators exact under RMSNorm,
RoPE and grouped queries: complete key/value groups grow, heads keep their width, and the gain and
eps of the norms follow the residual stream (docs/reference/operators.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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
from megagrow.model.layers.base import RESIDUAL, VOCAB
from megagrow.model.layers.table import activation_axes


@dataclass(frozen=True, eq=False)
class Width:
    """Growth of all activation axes and the changes that accompany it."""

    lifts: dict[str, Lift]
    """Lift of each activation axis by name."""
    gain: float = 1.0
    """Factor on the gains of the norms, sqrt(c d / d') if P^T P = c I; eps takes its square."""
    exact: bool = True
    scaled_eps: bool = True
    """True if rms_norm_eps follows the gain."""
    literal_zero: bool = False
    """True for the paper's [[W, A], [0, C]] in every matrix, independent of axis roles."""
    block_diagonal: bool = False
    """Each copy of an output reads only its copy of the inputs (Staged Training)."""
    next_layer: bool = False
    """Copies after the first come from the next layer (bert2BERT's AKI)."""
    noise: float = 0.0
    """Noise on consumers of copies, relative to the initial standard deviation. It cancels in their
    output."""

    @property
    def eps_gain(self) -> float:
        """Return the square root of the factor on rms_norm_eps."""
        return self.gain if self.scaled_eps else 1.0


WidthOperator = Callable[[ModelConfig, ModelConfig, GrowthConfig, np.random.Generator], Width]
Lifting = Callable[[int, int], Lift]
"""(old size, new size) of an axis to its lift."""


def axis_lifts(
    source: ModelConfig, target: ModelConfig, residual: Lifting, inner: Lifting
) -> dict[str, Lift]:
    """Return lifts of all activation axes: `residual` for the residual stream, `inner` for others.

    Axes that are counted by one config field grow by one lift of its units. A group is one
    key/value head with its query heads and grows as a unit (docs/reference/operators.md). The
    vocabulary and axes without units do not grow.
    """
    lifts: dict[str, Lift] = {}
    units: dict[str, Lift] = {}
    for axis in activation_axes(target).values():
        if axis == VOCAB or axis.grown_by is None:
            lifts[axis.name] = unchanged(axis.size(source))
            continue
        old, new = (getattr(model, axis.grown_by) for model in (source, target))
        if axis.grown_by not in units:
            units[axis.grown_by] = _lift(residual if axis == RESIDUAL else inner, old, new)
        lift = units[axis.grown_by]
        if axis.sizes != (axis.grown_by,):
            lift = product(lift, unchanged(axis.size(source) // old))
        lifts[axis.name] = lift
    return lifts


def _lift(make: Lifting, size: int, grown: int) -> Lift:
    return unchanged(size) if size == grown else make(size, grown)


def same_width(source: ModelConfig) -> Width:
    """Return the width of a growth in depth only."""
    return Width(axis_lifts(source, source, _never, _never))


def _never(size: int, grown: int) -> Lift:
    raise AssertionError(f"an axis of {size} entries must not grow to {grown}")


def direct_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return the paper's G_direct in width: copies, whose consumers share the weights.

    Exact if the residual stream grows by an integer factor. In interleaved order no data moves
    between tensor-parallel ranks. With `paper_exact` the gains are scaled by sqrt(d / D) (eq. 8),
    which does not preserve the function.
    """

    def make(size: int, grown: int) -> Lift:
        lift = copied(size, grown, options.copy_order)
        return unevenly(lift, generator) if options.copy_split == "uneven" else lift

    lifts = axis_lifts(source, target, make, make)
    integer = target.hidden_size % source.hidden_size == 0
    width = Width(lifts, exact=integer, noise=options.noise or 0.0)
    if options.paper_exact:
        gain = (source.hidden_size / target.hidden_size) ** 0.5
        return replace(width, gain=gain, exact=gain == 1, scaled_eps=False)
    return width


def zero_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return the paper's G_zero in width, for any size; exact with the gain and eps rule.

    New residual entries are zero and their consumers are random. New neurons and heads are random
    and their consumers are zero. With `paper_exact` every matrix instead has zeros at the bottom
    left (appendix A.4), which leaves new neurons without a gradient, and eps does not change.
    """
    residual = partial(padded, random_out=False, random_in=True)
    inner = partial(padded, random_out=True, random_in=False)
    gain = (source.hidden_size / target.hidden_size) ** 0.5
    width = Width(axis_lifts(source, target, residual, inner), gain)
    if options.paper_exact:
        return replace(width, literal_zero=True, scaled_eps=False, exact=gain == 1)
    return width


def random_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return the paper's G_random in width (MSG): all new entries are random, behind masks that
    ramp from 0 to 1. Exact at mask 0."""
    make = partial(padded, random_out=True, random_in=True)
    return Width(axis_lifts(source, target, make, make))


def net2net_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return Net2Net (Chen et al. 2016): new entries are random picks of old ones.

    Consumers are divided by the number of copies. Exact if the residual stream grows by an integer
    factor.
    """
    make = partial(drawn, generator=generator)
    integer = target.hidden_size % source.hidden_size == 0
    lifts = axis_lifts(source, target, make, make)
    return Width(lifts, exact=integer, noise=options.noise or 0.0)


def staged_width(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return Staged Training (Shen et al. 2022): two copies of the model, block-diagonal. Exact.

    Moments are copied to all blocks, including the zero ones, which have the same gradients.
    """
    return replace(direct_width(source, target, options, generator), block_diagonal=True)


def bert2bert_fpi(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return bert2BERT's function-preserving initialization (Chen et al. 2022): axes repeated from
    the front. Exact if the residual stream grows by an integer factor."""
    make = partial(copied, order="tiled")
    integer = target.hidden_size % source.hidden_size == 0
    return Width(axis_lifts(source, target, make, make), exact=integer)


def bert2bert_aki(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return bert2BERT's advanced knowledge initialization: FPI with copies from the next layer.
    Not exact."""
    width = bert2bert_fpi(source, target, options, generator)
    return replace(width, next_layer=True, exact=False)


def lemon(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return LEMON (Wang et al. 2024), for any size. Exact.

    Circular copies, whose consumers differ by random parts that cancel (its projection split), and
    a zero residue of the residual stream.
    """
    lifts = axis_lifts(source, target, copied_then_padded, partial(copied, order="tiled"))
    factor = target.hidden_size // source.hidden_size
    gain = (factor * source.hidden_size / target.hidden_size) ** 0.5
    return Width(lifts, gain, noise=1.0 if options.noise is None else options.noise)


def hypercloning(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return HyperCloning (Samragh et al. 2024): integer factors, tiled, with cancelling noise.
    Exact."""
    width = bert2bert_fpi(source, target, options, generator)
    return replace(width, noise=0.1 if options.noise is None else options.noise)


def sparkling(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return SPARKLING (arXiv 2602.02472, section 3): copies that keep the RMS of each output.

    The factor is 1 / sqrt(1 + 3c) for a share c <= 1 of copied inputs, 1 / (1 + c) above. With
    `new_layer_init: random` new entries are random, and the factor is sqrt(d_in / d_in').
    Approximately function-preserving; exact for integer factors of copies. Moments are transferred
    unscaled.
    """
    make = _copied_by_rms if options.new_layer_init == "copy" else _random_by_rms
    lifts = axis_lifts(source, target, make, make)
    integer = all(lift.grown_size % lift.size == 0 for lift in lifts.values())
    return Width(lifts, exact=integer and options.new_layer_init == "copy", scaled_eps=False)


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
    """Return wider heads under RoPE, by an integer factor r. Exact.

    The pair of frequency i moves to pair r i, keys are scaled by sqrt(r), new keys and new columns
    of o_proj are zero.
    """
    old, new = source.head_dim, target.head_dim
    pairs = np.full(new // 2, -1)
    pairs[:: new // old] = np.arange(old // 2)
    turned = np.concatenate([pairs, np.where(pairs < 0, -1, pairs + old // 2)])
    query = replace(evenly(old, turned), random_out=True)
    key = replace(evenly(old, turned), produce=np.full(new, (new / old) ** 0.5))
    value = padded(old, new, random_out=True, random_in=False)
    kv_heads, heads = source.num_key_value_heads, source.num_attention_heads
    lifts = same_width(source).lifts | {
        "query": product(unchanged(heads), query),
        "key": product(unchanged(kv_heads), key),
        "value": product(unchanged(kv_heads), value),
        "mixed": product(unchanged(heads), value),
    }
    return Width(lifts)


def vocabulary(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return new tokens at the end of the vocabulary, with initial weights. The logits of the old
    tokens do not change; the softmax covers more tokens."""
    lift = padded(source.vocab_size, target.vocab_size, random_out=True, random_in=False)
    lifts = same_width(source).lifts | {"vocab": lift}
    return Width(lifts, exact=source.vocab_size == target.vocab_size)


def isometric(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, generator: np.random.Generator
) -> Width:
    """Return sizes, gain and eps of an isometric growth; `isometric_map` adds the rotation."""
    residual = partial(padded, random_out=False, random_in=True)
    gain = (source.hidden_size / target.hidden_size) ** 0.5
    return Width(axis_lifts(source, target, residual, _never), gain)
