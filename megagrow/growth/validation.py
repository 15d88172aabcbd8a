"""Validation of growth sections. Problems are returned as one-line texts that contain the fix."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.config.model import WEIGHTLESS_KEYS
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.growth.constraints import (
    Event,
    copies_listed_layers,
    nothing_to_copy,
    preserved_types,
    rule_of,
)
from megagrow.growth.mask_schedule import ramp_problems
from megagrow.growth.operators import (
    OPERATORS,
    follows_exactly,
    growth_map,
    is_learned,
    is_masked,
    operators_of,
    resolve_operators,
    state_policy,
)
from megagrow.model.layers.table import width_fields

_DEPTH = ("num_hidden_layers", "layer_types")
"""Model fields that depth operators change."""

_GROWS: dict[OperatorName, tuple[str, ...]] = {
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
    "isometric": ("hidden_size", "rms_norm_eps"),
}
"""Model fields that an operator changes, where these are not the depth or all widths."""


def growth_problems(run: RunConfig) -> list[str]:
    """Return all problems of the growths of a run."""
    problems: list[str] = []
    for index in range(1, len(run.stages)):
        options = run.stages[index].growth
        if options is not None:
            source, target = run.stages[index - 1].model, run.stages[index].model
            before, here = f"stages.{index - 1}.model", f"stages.{index}"
            problems += [*_probe(options, here), *_new_entries(options, here)]
            problems += unused_keys(options, f"{here}.growth")
            for chosen in candidates(options):
                problems += event_problems(Event(source, target, chosen, before, here))
                problems += _changed_optimizer(run, index, chosen)
            problems += learning_problems(source, target, options, f"{here}.growth")
    return problems or ramp_problems(run)


def _changed_optimizer(run: RunConfig, index: int, options: GrowthConfig) -> Iterator[str]:
    before, here = (run.stages[at].optimizer.type for at in (index - 1, index))
    if here != before and follows_exactly(options):
        yield (
            f"stages.{index}.growth.exact_continuation needs the optimizer of the source, but "
            f"optimizer.type changes from {before} to {here}; keep it, or set it to false"
        )


def candidates(options: GrowthConfig) -> list[GrowthConfig]:
    """Return the possible growths: the given one, or one per operator of its probe."""
    if options.probe is None:
        return [options]
    names = options.probe.operators
    return [options.model_copy(update={"operator": [name], "probe": None}) for name in names]


def _probe(options: GrowthConfig, here: str) -> Iterator[str]:
    if options.probe is None:
        return
    if options.operator != GrowthConfig.model_fields["operator"].default:
        yield f"{here}.growth sets both operator and probe; remove one of them"
    for name in options.probe.operators:
        if OPERATORS[name].learned:
            yield f"{here}.growth.probe: {name} is learned and cannot be probed; remove it"


def unused_keys(options: GrowthConfig, at: str) -> Iterator[str]:
    """Yield a problem for each key that is set and that no operator of the growth uses."""
    chosen = [name for candidate in candidates(options) for name in candidate.operator]
    for key in sorted(keys_without_use(options)):
        value = getattr(options, key)
        if value != GrowthConfig.model_fields[key].default:
            users = [name for name, operator in OPERATORS.items() if key in operator.keys]
            yield (
                f"{at}.{key} is set, but {' and '.join(chosen)} does not use it; remove it, or use "
                f"one of {', '.join(users)}"
            )
    policies = {state_policy(candidate) for candidate in candidates(options)}
    batches = GrowthConfig.model_fields["second_moment_batches"].default
    if options.second_moment_batches != batches and "estimate_second_moment" not in policies:
        yield (
            f"{at}.second_moment_batches is set, but optimizer_state is {', '.join(policies)}; "
            "remove it, or set optimizer_state to estimate_second_moment"
        )


def keys_without_use(options: GrowthConfig) -> set[str]:
    """Return the keys that some operators use, but none of this growth."""
    chosen = [name for candidate in candidates(options) for name in candidate.operator]
    used = {key for name in chosen for key in OPERATORS[name].keys}
    return {key for operator in OPERATORS.values() for key in operator.keys} - used


def _new_entries(options: GrowthConfig, here: str) -> Iterator[str]:
    own = options.new_entries or any(operator.rewarms for operator in operators_of(options))
    if own and options.lr_schedule == "rewarm":
        yield (
            f"{here}.growth.lr_schedule = rewarm: the learning rate of new entries starts from the "
            "rate at the growth, which rewarm sets near zero; set it to continue or by_size"
        )


def event_problems(event: Event) -> list[str]:
    """Return all problems of one growth, of the first check that fails: combination of operators,
    layer types, sizes, constraints of each operator, copied layers, norms and optimizer states."""
    checks = (_combination, _types, _sizes, _operators, preserved_types, _norms_and_states)
    for check in checks:
        if problems := list(check(event)):
            return problems
    return []


def _combination(event: Event) -> Iterator[str]:
    chosen = [OPERATORS[name] for name in event.options.operator]
    for axis, operators in (
        ("depth", [operator.deeper for operator in chosen if operator.deeper]),
        ("width", [operator.wider for operator in chosen if operator.wider]),
    ):
        if len(operators) > 1:
            yield f"{event.here}.growth.operator has several {axis} operators; keep one"
    if is_masked(event.options) and not all(operator.masked for operator in chosen):
        yield (
            f"{event.here}.growth.operator: {event.names}: random operators can only be combined "
            "with random ones, unless growth.ramp_tokens is 0"
        )
    if event.options.optimizer_state == "estimate_second_moment" and (
        "isometric" in event.options.operator or is_masked(event.options)
    ):
        yield (
            f"{event.here}.growth.optimizer_state = estimate_second_moment: new entries of "
            f"{event.names} have no gradient at the growth; use another policy"
        )
    if len({operator.learned for operator in chosen}) > 1:
        yield (
            f"{event.here}.growth.operator: {event.names}: learned operators can only be combined "
            "with learned ones"
        )
    if event.options.mixing_noise and "isometric" in event.options.operator:
        yield f"{event.here}.growth.mixing_noise is not supported by isometric; remove it"


def _types(event: Event) -> Iterator[str]:
    old, new = (set(model.layer_types) for model in (event.source, event.target))
    if old != new:
        yield (
            f"{event.here}.model has layers of {' and '.join(sorted(new))}, {event.before} of "
            f"{' and '.join(sorted(old))}; growth keeps the type of every layer"
        )


def _sizes(event: Event) -> Iterator[str]:
    changes = _changes(event)
    sizes = [*width_fields(event.target), "head_dim", "vocab_size"]
    if not copies_listed_layers(event.options):
        sizes.insert(0, "num_hidden_layers")
    smaller = {name: changes[name] for name in sizes if name in changes and _falls(changes[name])}
    if smaller:
        yield (
            f"{event.here}.model reduces {_listed(smaller)}; growth cannot shrink a model, so use "
            f"at least the sizes of {event.before}"
        )
    elif fixed := _ungrown(event):
        fit = fitting_operators(event)
        fix = f"set {event.here}.growth.operator to {fit}" if fit else _kept(event, fixed)
        yield f"{event.here}.model changes {_listed(fixed)}, which {event.names} cannot grow; {fix}"


def _kept(event: Event, fixed: dict[str, tuple[Any, Any]]) -> str:
    """Return the instruction to keep the values of the source; a changed default is not obvious."""
    if not all(isinstance(old, int | float | str | None) for old, _ in fixed.values()):
        return f"use the values of {event.before}"
    keys = (f"{event.here}.model.{name} to {json.dumps(old)}" for name, (old, _) in fixed.items())
    return f"set {' and '.join(keys)}"


def _changes(event: Event) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of each changed model field."""
    models = (event.source, event.target)
    values = {name: [getattr(model, name) for model in models] for name in ModelConfig.model_fields}
    return {name: (old, new) for name, (old, new) in values.items() if old != new}


def _ungrown(event: Event) -> dict[str, tuple[Any, Any]]:
    """Return the changes that the operators of an event cannot make."""
    changeable = set(WEIGHTLESS_KEYS)
    for name in event.options.operator:
        wider = OPERATORS[name].wider is not None
        fields = (*width_fields(event.target), "rms_norm_eps") if wider else _DEPTH
        changeable |= set(_GROWS.get(name, fields))
    return {name: change for name, change in _changes(event).items() if name not in changeable}


def _falls(change: tuple[int, int]) -> bool:
    old, new = change
    return new < old


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    *first, last = (f"{name} from {old} to {new}" for name, (old, new) in changes.items())
    return f"{', '.join(first)} and {last}" if first else last


def fitting_operators(event: Event) -> str | None:
    """Return operators that can grow the sizes of an event, as a run file names them, or None.

    One operator if that is enough, else the operator of the event and one more.
    """
    chosen = event.options.operator
    trials = [[name] for name in OPERATORS]
    if len(chosen) == 1:
        trials += [[*chosen, name] for name in OPERATORS]
    for names in trials:
        trial = replace(event, options=event.options.model_copy(update={"operator": names}))
        if not (_ungrown(trial) or any(_combination(trial)) or any(_operators(trial))):
            return f"[{', '.join(names)}]" if len(names) > 1 else names[0]
    return None


def _operators(event: Event) -> Iterator[str]:
    for name in event.options.operator:
        yield from nothing_to_copy(event, name) or rule_of(name)(event)


def _norms_and_states(event: Event) -> Iterator[str]:
    parts = resolve_operators(event.source, event.target, event.options, "")
    eps = event.source.rms_norm_eps * parts.width.eps_gain**2
    if abs(event.target.rms_norm_eps - eps) > 1e-6 * eps:
        yield (
            f"{event.here}.model.rms_norm_eps = {event.target.rms_norm_eps}: {event.names} changes "
            "the mean square of the residual stream and preserves the function only with "
            f"{eps:.10g}"
        )
    if follows_exactly(event.options) and not (
        growth_map(event.source, event.target, event.options).scales
        and state_policy(event.options) == "transport"
    ):
        yield (
            f"{event.here}.growth.exact_continuation requires even copies in width only, no noise, "
            "and optimizer_state = transport; set it to false"
        )


def learning_problems(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, at: str
) -> Iterator[str]:
    """Yield all problems of a growth by learned operators; `at` is the path of its section."""
    if not is_learned(options):
        return
    deeper = source.num_hidden_layers != target.num_hidden_layers
    for name in options.operator:
        if OPERATORS[name].deeper and not deeper:
            yield f"{at}.operator: {name} needs a target with more layers; remove {name}"
        if OPERATORS[name].wider and not _wider(source, target):
            yield f"{at}.operator: {name} needs a wider target; remove {name}"
    if options.mixing_noise:
        yield f"{at}.mixing_noise is not supported by learned operators; remove it"
    if state_policy(options) in ("asymmetric", "estimate_second_moment"):
        yield (
            f"{at}.optimizer_state = {options.optimizer_state}: learned operators mix old and new "
            "entries; set it to reset, keep_second_moment or transport"
        )
    if follows_exactly(options):
        yield f"{at}.exact_continuation is not supported by learned operators; set it to false"
    learn = options.learn
    if learn.min_lr > learn.lr:
        yield f"{at}.learn.min_lr = {learn.min_lr} is above lr = {learn.lr}; use at most lr"
    if learn.warmup_steps > learn.steps:
        yield (
            f"{at}.learn.warmup_steps = {learn.warmup_steps} is above steps = {learn.steps}; use "
            "at most steps"
        )


def _wider(source: ModelConfig, target: ModelConfig) -> bool:
    return any(getattr(source, field) != getattr(target, field) for field in width_fields(target))
