"""What keeps a run's growths from being possible, each in one text that says what to do. Pure."""

from collections.abc import Iterator

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.growth.constraints import WIDTHS, Event, rule_of
from megagrow.growth.mask_schedule import ramp_problems
from megagrow.growth.operators import (
    OPERATORS,
    follows_exactly,
    growth_map,
    is_learned,
    operators_of,
    resolve_operators,
    state_policy,
)
from megagrow.model.layers.base import VOCAB
from megagrow.model.layers.table import activation_axes

_FREE = ("initializer_range", "max_position_embeddings")
"""Fields of a model that any growth may change: no weight depends on them."""

_GROWS: dict[OperatorName, tuple[str, ...]] = {
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
    "isometric": ("hidden_size", "rms_norm_eps"),
}
"""What an operator may change where that is not the depth, or all of the width."""


def growth_problems(run: RunConfig) -> list[str]:
    """All that is wrong with the growths of a run."""
    found: list[str] = []
    for index in range(1, len(run.stages)):
        options = run.stages[index].growth
        if options is not None:
            source, target = run.stages[index - 1].model, run.stages[index].model
            before, here = f"stages.{index - 1}.model", f"stages.{index}"
            found += [*_probe(options, here), *_new_entries(options, here)]
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
    if options.operator != GrowthConfig.model_fields["operator"].default:
        yield f"{here}.growth has both an operator and a probe of several: leave one of them out"
    for name in options.probe.operators:
        if OPERATORS[name].learned:
            yield f"{here}.growth.probe: {name} is trained by itself and can not be a candidate"


def _new_entries(options: GrowthConfig, here: str) -> Iterator[str]:
    own = options.new_entries or any(operator.rewarms for operator in operators_of(options))
    if own and options.lr_schedule == "rewarm":
        yield (
            f"{here}.growth.lr_schedule = rewarm: the rate of new entries begins at that of the "
            "growth, which warm-up has just put near zero; set it to continue or by_size"
        )


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
    if event.options.optimizer_state == "estimate_second_moment" and (
        "isometric" in event.options.operator or any(operator.masked for operator in chosen)
    ):
        yield (
            f"{event.here}.growth.optimizer_state = estimate_second_moment: {event.names} has no "
            "new entries with a gradient at the growth; choose another"
        )
    if len({operator.learned for operator in chosen}) > 1:
        yield f"{event.here}.growth.operator: a learned operator goes with learned ones only"
    if event.options.mixing_noise and "isometric" in event.options.operator:
        yield f"{event.here}.growth.mixing_noise does not go with isometric: leave it out"


def _sizes(event: Event) -> Iterator[str]:
    changeable = set(_FREE)
    for name in event.options.operator:
        usual = (*WIDTHS, "rms_norm_eps") if OPERATORS[name].wider else ("num_hidden_layers",)
        changeable |= set(_GROWS.get(name, usual))
    for field in ModelConfig.model_fields:
        old, new = getattr(event.source, field), getattr(event.target, field)
        if old != new and field not in changeable:
            yield (
                f"{event.here}.model.{field} = {new} differs from {event.before}.{field} = {old}, "
                f"which {event.names} can not grow: make them equal"
            )
        elif field in (*WIDTHS, "head_dim", "vocab_size") and new < old:
            yield f"{event.here}.model.{field} = {new} is below {event.before}.{field} = {old}"


def _operators(event: Event) -> Iterator[str]:
    for name in event.options.operator:
        yield from rule_of(name)(event)


def _norms_and_states(event: Event) -> Iterator[str]:
    parts = resolve_operators(event.source, event.target, event.options, "")
    eps = event.source.rms_norm_eps * (parts.width.gain**2 if parts.width.scaled_eps else 1.0)
    if abs(event.target.rms_norm_eps - eps) > 1e-6 * eps:
        yield (
            f"{event.here}.model.rms_norm_eps = {event.target.rms_norm_eps}: {event.names} keeps "
            f"the function only with {eps:.10g}, since the residual stream has another mean square"
        )
    if follows_exactly(event.options) and not (
        growth_map(event.source, event.target, event.options).scales
        and state_policy(event.options) == "transport"
    ):
        yield (
            f"{event.here}.growth.exact_continuation needs even copies in width alone, without "
            "noise, and optimizer_state = transport: set it to false"
        )


def learning_problems(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, at: str
) -> Iterator[str]:
    """What is wrong with a growth by `learn_depth` or `learn_width`, whose section stands `at`."""
    if not is_learned(options):
        return
    deeper = source.num_hidden_layers != target.num_hidden_layers
    for name in options.operator:
        if OPERATORS[name].deeper and not deeper:
            yield f"{at}.operator: {name} needs a model with more layers; take {name} out"
        if OPERATORS[name].wider and not _wider(source, target):
            yield f"{at}.operator: {name} needs a wider model; take {name} out"
    for key, given in (
        ("paper_exact", options.paper_exact),
        ("new_layer_init", options.new_layer_init == "random"),
        ("noise", options.noise),
        ("mixing_noise", options.mixing_noise),
    ):
        if given:
            yield f"{at}.{key} does not go with a growth that is learned from copies: leave it out"
    if state_policy(options) in ("asymmetric", "estimate_second_moment"):
        yield (
            f"{at}.optimizer_state = {options.optimizer_state}: a learned growth mixes old and new "
            "entries; set it to reset, keep_second_moment or transport"
        )
    if follows_exactly(options):
        yield f"{at}.exact_continuation needs even copies, not learned ones: set it to false"
    learn = options.learn
    if learn.min_lr > learn.lr:
        yield f"{at}.learn.min_lr = {learn.min_lr} is above lr = {learn.lr}"
    if learn.warmup_steps > learn.steps:
        yield f"{at}.learn.warmup_steps = {learn.warmup_steps} is above steps = {learn.steps}"


def _wider(source: ModelConfig, target: ModelConfig) -> bool:
    axes = activation_axes(target).values()
    fields = {axis.grown_by for axis in axes if axis != VOCAB}
    return any(getattr(source, field) != getattr(target, field) for field in fields)
