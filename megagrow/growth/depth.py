"""Depth growth: operators choose the source layer of every target layer.

Du et al. 2024, "Stacking Your Transformers", section 3.1 and appendix A.3 to A.6.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig


@dataclass(frozen=True)
class Layer:
    """Source of one layer of the target."""

    source: int | None
    """Source layer; None for initial weights."""
    silent: bool = False
    """True if the last projections, or the gains of the norms that follow them, are zero, so that
    the layer adds nothing."""
    fresh: bool = False
    """True for a copy of a layer that also exists elsewhere."""


@dataclass(frozen=True)
class Depth:
    """All layers of the target; `exact` is True if they preserve the function."""

    layers: tuple[Layer, ...]
    exact: bool
    """With growth masks: while they are 0."""


DepthOperator = Callable[[ModelConfig, ModelConfig, GrowthConfig], Depth]


def copied_layers(layers: list[int], silent: bool = False) -> tuple[Layer, ...]:
    """Build the layers of a list; repeated layers are marked as copies, -1 is a new layer."""
    return tuple(
        Layer(None, silent, fresh=True)
        if layer < 0
        else Layer(layer, silent and layer in layers[:index], layer in layers[:index])
        for index, layer in enumerate(layers)
    )


def same_depth(source: ModelConfig) -> Depth:
    """Return the identity in depth."""
    return Depth(copied_layers(list(range(source.num_hidden_layers))), exact=True)


def stacked_layers(source_layers: int, target_layers: int) -> list[int]:
    """Return Gstack's list: the full stack repeated, [0..l-1] x g."""
    return [layer % source_layers for layer in range(target_layers)]


def interpolated_layers(source: ModelConfig, target: ModelConfig) -> list[int]:
    """Return the interpolation list, each layer repeated in place: 0 0 1 1 2 2 (paper, appendix
    H).

    Layer types that repeat with a period are repeated as complete periods: 0 1 0 1 2 3 2 3.
    """
    size, (old, new) = _periods(source, target)
    return _layers_of([index * old // new for index in range(new)], size)


def _periods(source: ModelConfig, target: ModelConfig) -> tuple[int, tuple[int, int]]:
    """Return the layers of a period of layer types, and the periods of source and target."""
    size = len(source.layer_types) if source.layer_types == target.layer_types else 1
    return size, (source.num_hidden_layers // size, target.num_hidden_layers // size)


def _layers_of(periods: list[int], size: int) -> list[int]:
    return [size * period + layer for period in periods for layer in range(size)]


PARTIAL_STACKS = (
    *("123456x4", "12-3456x5-56", "12-345x7-6", "123-456x7"),
    *("1234-56x10", "12-34x10-56", "1-234x7-56", "123x7-456"),
)
"""Partial stacks of the paper's Table 5, 6 to 24 layers, best first."""


def listed_layers(text: str) -> list[int] | None:
    """Parse a list in the paper's notation, with layers counted from 1.

    `12-345x7-6` is layers 1 2, then 3 4 5 seven times, then 6.
    """
    found: list[int] = []
    for part in text.split("-"):
        match = re.fullmatch(r"([1-9]+)(?:x([1-9]\d*))?", part)
        if match is None:
            return None
        found += [int(digit) - 1 for digit in match[1]] * int(match[2] or 1)
    return found


def chosen_layers(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> list[int]:
    """Return the list selected by the options; default: the full stack repeated.

    All layers of a source without layers are new.
    """
    old, new = source.num_hidden_layers, target.num_hidden_layers
    if old == 0 and not isinstance(options.layer_map, list):
        return [-1] * new
    match options.layer_map:
        case list():
            return list(options.layer_map)
        case None | "stack":
            return stacked_layers(old, new)
        case "interpolate":
            return interpolated_layers(source, target)
        case str():
            return listed_layers(options.layer_map) or []
    raise AssertionError(f"growth.layer_map = {options.layer_map}")


def direct_depth(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return the paper's G_direct in depth (Gstack): target layer i copies source layer layers[i].

    Embedding, final norm and head are copied once. The grown model does not preserve the function:
    the loss jumps, then recovers.
    """
    layers = chosen_layers(source, target, options)
    return Depth(copied_layers(layers), layers == list(range(source.num_hidden_layers)))


def zero_depth(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return the paper's G_zero in depth. Exact to the bit.

    New layers follow the layer that they copy, and their last projections are zero; with norms
    after the blocks, the gains of these norms. With `new_layer_init: random` their other weights
    are initial weights.
    """
    listed = options.layer_map is not None
    make = partial(chosen_layers, options=options) if listed else interpolated_layers
    layers = make(source, target)
    return _silenced(source, layers, options)


def _silenced(source: ModelConfig, layers: list[int], options: GrowthConfig) -> Depth:
    """Return layers of which all but the first copy of each source layer are silent.

    Exact if the first copies are all layers of the source in order.
    """
    found = copied_layers(layers, silent=True)
    if options.new_layer_init == "random":
        found = tuple(Layer(None, True, True) if layer.fresh else layer for layer in found)
    return Depth(found, _keeps_all(source, found))


def random_depth(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return the paper's G_random in depth (MSG): new layers with initial weights.

    They are on top, or where `layer_map` repeats a layer. Masks in the running model ramp from 0 to
    1, and the growth is exact at mask 0. With `ramp_tokens: 0` there are no masks (Bu et al. 2025,
    arXiv 2511.04981).
    """
    found = copied_layers(chosen_layers(source, target, options))
    found = tuple(Layer(None, fresh=True) if layer.fresh else layer for layer in found)
    return Depth(found, _keeps_all(source, found))


def _keeps_all(source: ModelConfig, layers: tuple[Layer, ...]) -> bool:
    """Return True if the layers that are not new are all layers of the source, in order."""
    kept = [layer.source for layer in layers if not layer.fresh]
    return kept == list(range(source.num_hidden_layers))


def solar(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return SOLAR's growth (Kim et al. 2023): layers 0..n-m-1, then m..n-1. Not exact."""
    old, new = source.num_hidden_layers, target.num_hidden_layers
    left_out = old - new // 2
    layers = [*range(old - left_out), *range(left_out, old)]
    return Depth(copied_layers(layers), exact=False)


def llama_pro(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return LLaMA-Pro's growth (Wu et al. 2024). Exact to the bit.

    Every l / (L - l) layers are followed by a silent copy of the last of them, or of the last
    period of layer types.
    """
    size, (old, new) = _periods(source, target)
    every = old // (new - old)
    periods = [i for index in range(old) for i in [index] * (1 + ((index + 1) % every == 0))]
    return _silenced(source, _layers_of(periods, size), options)


def mslt(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return MSLT's growth (Yang et al. 2020): the top layers are repeated on top. Not exact.

    Set freeze_tokens, because MSLT at first trains only the new layers.
    """
    old, new = source.num_hidden_layers, target.num_hidden_layers
    return Depth(copied_layers([*range(old), *range(2 * old - new, old)]), exact=False)


def midas(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return MIDAS' growth (Saunshi et al. 2024). Not exact.

    The source is divided into blocks of L - l layers, and the middle block is repeated.
    """
    old, size = source.num_hidden_layers, target.num_hidden_layers - source.num_hidden_layers
    end = -(-(old // size) // 2) * size
    return Depth(copied_layers([*range(end), *range(end - size, old)]), exact=False)


def lidas(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> Depth:
    """Return LIDAS' growth (arXiv 2512.08819). Not exact.

    As MIDAS, but the inserted layers are the second half of the block below and the first half of
    the block above.
    """
    old, size = source.num_hidden_layers, target.num_hidden_layers - source.num_hidden_layers
    middle = -(-(old // size) // 2) * size
    inserted = range(middle - size // 2, middle - size // 2 + size)
    layers = [*range(middle), *inserted, *range(middle, old)]
    return Depth(copied_layers(layers), exact=False)
