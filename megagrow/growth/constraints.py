"""From which sizes to which each operator can grow a model; a broken rule is told in one text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.config.schema import ModelConfig
from megagrow.growth.depth import PARTIAL_STACKS, listed_layers
from megagrow.growth.operators import OPERATORS, resolve_operators

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

"""The fields of a model that make its width."""

Rule = Callable[["Event"], Iterator[str]]


@dataclass(frozen=True)
class Event:
    """One growth of a run, as its problems see it."""

    source: ModelConfig
    target: ModelConfig
    options: GrowthConfig
    before: str
    here: str

    @property
    def names(self) -> str:
        return " with ".join(self.options.operator)

    def layers(self) -> tuple[int, int]:
        return self.source.num_hidden_layers, self.target.num_hidden_layers


def rule_of(name: OperatorName) -> Rule:
    """What looks at a growth by this operator; sizes that it may not change at all are known."""
    return _RULES.get(name, _any_width if OPERATORS[name].wider else _any_depth)


def _any_depth(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if new < old:
        yield (
            f"{event.here}.model.num_hidden_layers = {new} is below "
            f"{event.before}.num_hidden_layers = {old}"
        )


def _direct_depth(event: Event) -> Iterator[str]:
    """Every new layer must be a copy of a layer that exists."""
    (old, new), layers = event.layers(), event.options.layer_map
    at = f"{event.here}.growth.layer_map"
    if layers in (None, "stack"):
        if new % old:
            yield (
                f"{event.here}.model.num_hidden_layers = {new} is not a multiple of "
                f"{event.before}.num_hidden_layers = {old}: give {at}"
            )
        return
    if layers == "interpolate":
        return
    named = listed_layers(layers) if isinstance(layers, str) else layers
    if not named:
        yield (
            f"{at} = {layers!r} is not a list, `stack`, `interpolate`, or a partial stack such as "
            f"those of the paper, {', '.join(PARTIAL_STACKS)}"
        )
        return
    if len(named) != new:
        yield f"{at} has {len(named)} entries for {event.here}.model.num_hidden_layers = {new}"
    for layer in sorted({layer for layer in named if layer >= old}):
        yield f"{at} names layer {layer}, but {event.before} has layers 0 to {old - 1}"


def _zero_depth(event: Event) -> Iterator[str]:
    problems = [*_any_depth(event)]
    if event.options.layer_map is not None:
        problems += _direct_depth(event)
    yield from problems
    if not problems:
        parts = resolve_operators(event.source, event.target, event.options, "")
        if not parts.depth.exact:
            yield (
                f"{event.here}.growth.layer_map leaves out or reorders layers, which {event.names} "
                "must keep: name all of them, first occurrences in order"
            )


def _solar(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if new % 2 or not old <= new <= 2 * old:
        yield (
            f"{event.here}.model.num_hidden_layers = {new}: solar makes an even number from {old} "
            f"to {2 * old}"
        )


def _llama_pro(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if not old < new <= 2 * old or old % (new - old):
        yield (
            f"{event.here}.model.num_hidden_layers = {new}: llama_pro adds a number of layers that "
            f"divides the {old} there are"
        )


def _mslt(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if not old < new <= 2 * old:
        yield f"{event.here}.model.num_hidden_layers = {new}: mslt adds 1 to {old} layers"


def _midas(event: Event) -> Iterator[str]:
    old, new = event.layers()
    blocks = 2 if "lidas" in event.options.operator else 1
    if new <= old or old % (new - old) or old // (new - old) < blocks:
        yield (
            f"{event.here}.model.num_hidden_layers = {new}: {event.names} adds one block, whose "
            f"size divides the {old} layers into at least {blocks}"
        )


def _any_width(event: Event) -> Iterator[str]:
    ratios = [m.num_attention_heads // m.num_key_value_heads for m in (event.source, event.target)]
    if ratios[0] != ratios[1]:
        yield (
            f"{event.here}.model has {ratios[1]} query heads for each key/value head, "
            f"{event.before} has {ratios[0]}: whole groups grow, keep the ratio"
        )


def _whole_residual(event: Event) -> Iterator[str]:
    yield from _any_width(event)
    if not event.options.paper_exact:
        yield from _multiples(event, ("hidden_size",), "lemon or zero_width take any size")


def _all_whole(event: Event) -> Iterator[str]:
    yield from _any_width(event)
    yield from _multiples(event, WIDTHS, "lemon or zero_width take any size")


def _multiples(event: Event, names: tuple[str, ...], instead: str) -> Iterator[str]:
    for name in names:
        old, new = getattr(event.source, name), getattr(event.target, name)
        if new % old:
            yield (
                f"{event.here}.model.{name} = {new} is not a multiple of {event.before}.{name} = "
                f"{old}, which {event.names} needs; {instead}"
            )


def _staged_width(event: Event) -> Iterator[str]:
    yield from _any_width(event)
    for name in WIDTHS:
        old, new = getattr(event.source, name), getattr(event.target, name)
        if new != 2 * old:
            yield f"{event.here}.model.{name} = {new}: staged_width doubles it to {2 * old}"


def _isometric(event: Event) -> Iterator[str]:
    if event.source.tie_word_embeddings:
        yield f"{event.here}.model: isometric needs tie_word_embeddings = false, a head of its own"


def _head_dim(event: Event) -> Iterator[str]:
    yield from _multiples(event, ("head_dim",), "give a whole factor")
    scaling = event.source.rope_scaling
    if scaling is not None and scaling.rope_type == "yarn":
        yield (
            f"{event.here}.model: head_dim can not grow a model whose rope_scaling is yarn, which "
            "scales a pair of entries by its place in the head"
        )


_RULES: dict[OperatorName, Rule] = {
    "direct_depth": _direct_depth,
    "zero_depth": _zero_depth,
    "learn_depth": _zero_depth,
    "solar": _solar,
    "llama_pro": _llama_pro,
    "mslt": _mslt,
    "midas": _midas,
    "lidas": _midas,
    "direct_width": _whole_residual,
    "learn_width": _whole_residual,
    "net2net_width": _whole_residual,
    "hypercloning": _all_whole,
    "mup_copy": _all_whole,
    "staged_width": _staged_width,
    "isometric": _isometric,
    "head_dim": _head_dim,
}
