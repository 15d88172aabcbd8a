"""Constraints of each operator on the sizes of source and target, with one-line problem texts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.config.schema import ModelConfig
from megagrow.growth.depth import PARTIAL_STACKS, listed_layers
from megagrow.growth.operators import OPERATORS, resolve_operators
from megagrow.model.layers.table import width_fields

Rule = Callable[["Event"], Iterator[str]]


@dataclass(frozen=True)
class Event:
    """One growth to validate: models and options, with their paths in the run file."""

    source: ModelConfig
    target: ModelConfig
    options: GrowthConfig
    before: str
    """Path of the source model, such as stages.0.model."""
    here: str
    """Path of the target stage, such as stages.1."""

    @property
    def names(self) -> str:
        """Names of the operators."""
        return " with ".join(self.options.operator)

    def layers(self) -> tuple[int, int]:
        """Return the layers of the source and of the target."""
        return self.source.num_hidden_layers, self.target.num_hidden_layers


def preserved_types(event: Event) -> Iterator[str]:
    """Require that every target layer copies a source layer of its own type."""
    layers = resolve_operators(event.source, event.target, event.options, "").depth.layers
    for index, layer in enumerate(layers):
        if layer.source is None:
            continue
        old, new = event.source.layer_type(layer.source), event.target.layer_type(index)
        if old != new:
            yield (
                f"{event.here}: {event.names} would copy layer {layer.source} of {event.before} "
                f"({old}) to layer {index} ({new}); choose layers or "
                f"{event.here}.model.layer_types that keep the type of every layer"
            )
            return


def nothing_to_copy(event: Event, name: OperatorName) -> list[str]:
    """Return a problem if an operator copies layers and the source has none."""
    (old, _), operator = event.layers(), OPERATORS[name]
    if old > 0 or operator.deeper is None or operator.from_nothing:
        return []
    fit = " or ".join(each for each, found in OPERATORS.items() if found.from_nothing)
    return [
        f"{event.before}.num_hidden_layers = 0: {name} copies layers, and the source has none; use "
        f"{fit}"
    ]


def rule_of(name: OperatorName) -> Rule:
    """Return the rule of an operator; fields that it cannot change are validated elsewhere."""
    return _RULES.get(name, _any_width if OPERATORS[name].wider else _any_depth)


def copies_listed_layers(options: GrowthConfig) -> bool:
    """Return True if `layer_map` selects the layers, which may then be fewer than before."""
    return "direct_depth" in options.operator and options.layer_map not in (None, "stack")


def _any_depth(event: Event) -> Iterator[str]:
    yield from ()


def _direct_depth(event: Event) -> Iterator[str]:
    """Require every layer to be a copy of a source layer."""
    (old, new), layers = event.layers(), event.options.layer_map
    at = f"{event.here}.growth.layer_map"
    if layers in (None, "stack"):
        if new % old:
            yield (
                f"{event.here}.model.num_hidden_layers = {new} is not divisible by "
                f"{event.before}.num_hidden_layers = {old}; use a multiple or set {at}"
            )
        return
    if layers == "interpolate":
        return
    listed = listed_layers(layers) if isinstance(layers, str) else layers
    if not listed:
        yield (
            f"{at} = {layers!r} is not a list, `stack`, `interpolate`, or a partial stack such as "
            f"the paper's {', '.join(PARTIAL_STACKS)}"
        )
        return
    if len(listed) != new:
        yield (
            f"{at} has {len(listed)} entries, but {event.here}.model.num_hidden_layers = {new}; "
            f"list {new} layers"
        )
    for layer in sorted({layer for layer in listed if layer >= old}):
        layers = f"layers 0 to {old - 1}" if old else "no layers"
        yield f"{at} contains layer {layer}, but {event.before} has {layers}"


def _zero_depth(event: Event) -> Iterator[str]:
    problems = [*_direct_depth(event)] if event.options.layer_map is not None else []
    yield from problems
    if not problems:
        parts = resolve_operators(event.source, event.target, event.options, "")
        if not parts.depth.exact:
            yield (
                f"{event.here}.growth.layer_map omits or reorders source layers, which "
                f"{event.names} must keep; list all of them, with first occurrences in order"
            )


def _learn_depth(event: Event) -> Iterator[str]:
    if isinstance(event.options.layer_map, list) and -1 in event.options.layer_map:
        yield (
            f"{event.here}.growth.layer_map contains -1, but learn_depth mixes source layers in "
            "every layer; list source layers"
        )
    else:
        yield from _zero_depth(event)


def _solar(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if new % 2 or not old <= new <= 2 * old:
        yield (
            f"{event.here}.model.num_hidden_layers = {new}: solar needs an even number from {old} "
            f"to {2 * old}"
        )


def _llama_pro(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if not old < new <= 2 * old or old % (new - old):
        yield (
            f"{event.here}.model.num_hidden_layers = {new}: llama_pro adds {new - old} layers, "
            f"which must be a divisor of {event.before}.num_hidden_layers = {old}"
        )


def _mslt(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if not old < new <= 2 * old:
        yield (
            f"{event.here}.model.num_hidden_layers = {new}: mslt needs a number from {old + 1} to "
            f"{2 * old}"
        )


def _midas(event: Event) -> Iterator[str]:
    old, new = event.layers()
    blocks = 2 if "lidas" in event.options.operator else 1
    if new <= old or old % (new - old) or old // (new - old) < blocks:
        yield (
            f"{event.here}.model.num_hidden_layers = {new}: {event.names} adds one block, whose "
            f"size must divide the {old} source layers into {blocks} or more blocks"
        )


def _any_width(event: Event) -> Iterator[str]:
    ratios = [m.num_attention_heads // m.num_key_value_heads for m in (event.source, event.target)]
    if ratios[0] != ratios[1]:
        yield (
            f"{event.here}.model has {ratios[1]} query heads per key/value head, {event.before} "
            f"has {ratios[0]}; keep the ratio"
        )
    elif event.source.qk_norm == "full_width":
        yield from _evenly_copied_heads(event)


def _evenly_copied_heads(event: Event) -> Iterator[str]:
    """Require equally many copies of every head, which keep the mean square over all heads."""
    lift = resolve_operators(event.source, event.target, event.options, "").width.lifts["query"]
    if lift.new.any() or len(set(lift.copies.tolist())) > 1:
        yield (
            f"{event.here}.model.num_key_value_heads = {event.target.num_key_value_heads}: "
            f"{event.names} changes the mean square of qk_norm = full_width; keep the heads, or "
            f"copy all equally often, such as by direct_width to a multiple of "
            f"{event.source.num_key_value_heads}"
        )


def _integer_residual_factor(event: Event) -> Iterator[str]:
    yield from _any_width(event)
    if not event.options.paper_exact:
        yield from _multiples(event, ("hidden_size",), "lemon and zero_width support any size")


def _integer_factors(event: Event) -> Iterator[str]:
    yield from _any_width(event)
    yield from _multiples(
        event, width_fields(event.target), "lemon and zero_width support any size"
    )


def _multiples(event: Event, names: tuple[str, ...], fix: str) -> Iterator[str]:
    for name in names:
        old, new = getattr(event.source, name), getattr(event.target, name)
        if new % old:
            yield (
                f"{event.here}.model.{name} = {new} is not divisible by {event.before}.{name} = "
                f"{old}, which {event.names} requires; {fix}"
            )


def _staged_width(event: Event) -> Iterator[str]:
    yield from _any_width(event)
    for name in width_fields(event.target):
        old, new = getattr(event.source, name), getattr(event.target, name)
        if new != 2 * old:
            yield (
                f"{event.here}.model.{name} = {new}: staged_width needs {2 * old}, twice the source"
            )


def _isometric(event: Event) -> Iterator[str]:
    if event.source.tie_word_embeddings:
        yield (
            f"{event.here}.model.tie_word_embeddings = true is not supported by isometric; grow an "
            "untied model"
        )
    if event.source.norm_position == "post":
        yield (
            f"{event.here}.model.norm_position = post is not supported by isometric, which rotates "
            "the residual stream before the gains of the norms; use lemon or zero_width"
        )


def _head_dim(event: Event) -> Iterator[str]:
    yield from _multiples(event, ("head_dim",), "use a multiple")
    if event.source.qk_norm is not None:
        yield (
            f"{event.here}.model.qk_norm = {event.source.qk_norm} is not supported by head_dim: "
            "new entries of a head change its mean square; use another operator"
        )
    scaling = event.source.rope_scaling
    if scaling is not None and scaling.rope_type == "yarn":
        yield (
            f"{event.here}.model: operator head_dim does not support rope_scaling yarn, which "
            "scales each pair of entries by its index in the head; use another operator"
        )


_RULES: dict[OperatorName, Rule] = {
    "direct_depth": _direct_depth,
    "zero_depth": _zero_depth,
    "learn_depth": _learn_depth,
    "random_depth": _zero_depth,
    "solar": _solar,
    "llama_pro": _llama_pro,
    "mslt": _mslt,
    "midas": _midas,
    "lidas": _midas,
    "direct_width": _integer_residual_factor,
    "learn_width": _integer_residual_factor,
    "net2net_width": _integer_residual_factor,
    "hypercloning": _integer_factors,
    "mup_copy": _integer_factors,
    "staged_width": _staged_width,
    "isometric": _isometric,
    "head_dim": _head_dim,
}
