"""What keeps a run's growths from being possible, each in one text that says what to do. Pure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.growth.depth import listed_layers
from megagrow.growth.learning import learning_problems
from megagrow.growth.operators import OPERATORS, follows_exactly, growing, growth_map
from megagrow.growth.ramps import ramp_problems

_FREE = ("initializer_range", "max_position_embeddings")
"""Fields of a model that any growth may change: no weight depends on them."""

_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

_GROWS: dict[OperatorName, tuple[str, ...]] = {
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
    "isometric": ("hidden_size", "rms_norm_eps"),
}
"""What an operator may change where that is not the depth, or all of the width."""


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


def growth_problems(run: RunConfig) -> list[str]:
    """All that is wrong with the growths of a run."""
    found: list[str] = []
    for index in range(1, len(run.stages)):
        options = run.stages[index].growth
        if options is not None:
            source, target = run.stages[index - 1].model, run.stages[index].model
            before, here = f"stages.{index - 1}.model", f"stages.{index}"
            found += _probe(options, here)
            for chosen in candidates(options):
                found += event_problems(Event(source, target, chosen, before, here))
            found += learning_problems(source, target, options, f"{here}.growth")
    return found or ramp_problems(run)


def candidates(options: GrowthConfig) -> list[GrowthConfig]:
    """The growth as it may be carried out: as it stands, or by each operator of its probe."""
    if options.probe is None:
        return [options]
    names = options.probe.operators
    return [options.model_copy(update={"operator": [name], "probe": None}) for name in names]


def _probe(options: GrowthConfig, here: str) -> Iterator[str]:
    if options.probe is None:
        return
    if "operator" in options.model_fields_set:
        yield f"{here}.growth has both an operator and a probe of several: leave one of them out"
    for name in options.probe.operators:
        if OPERATORS[name].learned:
            yield f"{here}.growth.probe: {name} is trained by itself and can not be a candidate"


def event_problems(event: Event) -> list[str]:
    """All that is wrong with one growth. Sizes are looked at once the operators are known to be
    fit for each other, and the norms once the sizes are right."""
    for look in (_together, _sizes, _operators, _norms_and_states):
        found = list(look(event))
        if found:
            return found
    return []


def _together(event: Event) -> Iterator[str]:
    chosen = [OPERATORS[name] for name in event.options.operator]
    for what, parts in (
        ("depth", [operator.deeper for operator in chosen if operator.deeper]),
        ("width", [operator.wider for operator in chosen if operator.wider]),
    ):
        if len(parts) > 1:
            yield f"{event.here}.growth.operator names several operators of {what}: keep one"
    if len({operator.masked for operator in chosen}) > 1:
        yield f"{event.here}.growth.operator: a random operator goes with random ones only"
    if event.options.optimizer_state == "probe_v" and (
        "isometric" in event.options.operator or any(operator.masked for operator in chosen)
    ):
        yield (
            f"{event.here}.growth.optimizer_state = probe_v: {event.names} has no new entries with "
            "a gradient at the growth; choose another"
        )
    if len({operator.learned for operator in chosen}) > 1:
        yield f"{event.here}.growth.operator: a learned operator goes with learned ones only"
    if event.options.mixing_noise and "isometric" in event.options.operator:
        yield f"{event.here}.growth.mixing_noise does not go with isometric: leave it out"


def _sizes(event: Event) -> Iterator[str]:
    changeable = set(_FREE)
    for name in event.options.operator:
        usual = (*_WIDTHS, "rms_norm_eps") if OPERATORS[name].wider else ("num_hidden_layers",)
        changeable |= set(_GROWS.get(name, usual))
    for field in ModelConfig.model_fields:
        old, new = getattr(event.source, field), getattr(event.target, field)
        if old != new and field not in changeable:
            yield (
                f"{event.here}.model.{field} = {new} differs from {event.before}.{field} = {old}, "
                f"which {event.names} can not grow: make them equal"
            )
        elif field in (*_WIDTHS, "head_dim", "vocab_size") and new < old:
            yield f"{event.here}.model.{field} = {new} is below {event.before}.{field} = {old}"


def _operators(event: Event) -> Iterator[str]:
    for name in event.options.operator:
        look: Callable[[Event], Iterator[str]] = _RULES.get(
            name, _any_width if OPERATORS[name].wider else _any_depth
        )
        yield from look(event)


def _any_depth(event: Event) -> Iterator[str]:
    old, new = event.layers()
    if new < old:
        yield (
            f"{event.here}.model.num_hidden_layers = {new} is below "
            f"{event.before}.num_hidden_layers = {old}"
        )


def _direct_depth(event: Event) -> Iterator[str]:
    """Every new layer must be a copy of a layer that exists."""
    (old, new), layers = event.layers(), event.options.layers
    at = f"{event.here}.growth.layers"
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
            "12-3456x5-56"
        )
        return
    if len(named) != new:
        yield f"{at} has {len(named)} entries for {event.here}.model.num_hidden_layers = {new}"
    for layer in sorted({layer for layer in named if layer >= old}):
        yield f"{at} names layer {layer}, but {event.before} has layers 0 to {old - 1}"


def _zero_depth(event: Event) -> Iterator[str]:
    problems = [*_any_depth(event)]
    if event.options.layers is not None:
        problems += _direct_depth(event)
    yield from problems
    if not problems:
        parts = growing(event.source, event.target, event.options, "")
        if not parts.depth.exact:
            yield (
                f"{event.here}.growth.layers leaves out or reorders layers, which {event.names} "
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
    if not event.options.literal:
        yield from _multiples(event, ("hidden_size",), "lemon or zero_width take any size")


def _all_whole(event: Event) -> Iterator[str]:
    yield from _any_width(event)
    yield from _multiples(event, _WIDTHS, "lemon or zero_width take any size")


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
    for name in _WIDTHS:
        old, new = getattr(event.source, name), getattr(event.target, name)
        if new != 2 * old:
            yield f"{event.here}.model.{name} = {new}: staged_width doubles it to {2 * old}"


def _isometric(event: Event) -> Iterator[str]:
    if event.source.tie_word_embeddings:
        yield f"{event.here}.model: isometric needs tie_word_embeddings = false, a head of its own"


def _head_dim(event: Event) -> Iterator[str]:
    yield from _multiples(event, ("head_dim",), "give a whole factor")


_RULES: dict[OperatorName, Callable[[Event], Iterator[str]]] = {
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


def _norms_and_states(event: Event) -> Iterator[str]:
    parts = growing(event.source, event.target, event.options, "")
    eps = event.source.rms_norm_eps * (parts.width.gain**2 if parts.width.scaled_eps else 1.0)
    if abs(event.target.rms_norm_eps - eps) > 1e-6 * eps:
        yield (
            f"{event.here}.model.rms_norm_eps = {event.target.rms_norm_eps}: {event.names} keeps "
            f"the function only with {eps:.10g}, since the residual stream has another mean square"
        )
    if (
        follows_exactly(event.options)
        and not growth_map(event.source, event.target, event.options).scales
    ):
        yield (
            f"{event.here}.growth.exact_continuation needs even copies in width alone: set it to "
            "false"
        )
