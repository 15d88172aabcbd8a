"""Growths of a run and their effect on training: pure functions of its config."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from megagrow.config.model import same_function
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import settled
from megagrow.errors import ConfigError
from megagrow.growth.map import GrowthMap, identity_map, kept_state
from megagrow.growth.map_checks import check_map
from megagrow.growth.operators import follows_exactly, growth_map
from megagrow.growth.validation import candidates, keys_without_use
from megagrow.parallel.optimizers.rules import UNSCALED, ParamScale, matrix_rule
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Layout, layout_of
from megagrow.train.train_state import RunState


def stage_growth(run: RunConfig, index: int) -> GrowthMap:
    """Return the validated growth map of stage `index`, the identity if it has no growth."""
    source, stage = run.stages[index - 1], run.stages[index]
    rules = matrix_rule(source.optimizer), matrix_rule(stage.optimizer)
    plans = parameter_plan(source.model, 1, rules[0]), parameter_plan(stage.model, 1, rules[1])
    if stage.growth is None:
        kept = same_function(source.model, stage.model)
        growth = replace(identity_map(plans[1]), preserves_function=kept)
    else:
        stream = f"{run.seed}/stage-{index}"
        growth = growth_map(source.model, stage.model, stage.growth, stream, rules[1])
    check_map(growth, *plans)
    return kept_state(growth, *plans)


def stage_scales(run: RunConfig, index: int) -> dict[str, ParamScale]:
    """Return the factors on the hyper-parameters of a stage's parameters.

    They are set by growths with exact continuation and inherited by later stages: a parameter keeps
    the factors of its source. A stage with another optimizer has none.
    """
    scales: dict[str, ParamScale] = {}
    for later in range(1, index + 1):
        options = run.stages[later].growth
        if run.stages[later].optimizer.type != run.stages[later - 1].optimizer.type:
            scales = {}
            continue
        follows = options is not None and follows_exactly(options)
        if scales or follows:
            growth = stage_growth(run, later)
            scales = _passed_on(growth, scales, growth.scales if follows else {})
    return scales


def stage_layout(run: RunConfig, index: int, world_size: int) -> Layout:
    """Return the layout of a stage's state on `world_size` ranks, which must be valid."""
    return layout_of(run.stages[index], world_size, stage_scales(run, index))


def _passed_on(
    growth: GrowthMap, before: Mapping[str, ParamScale], added: Mapping[str, ParamScale]
) -> dict[str, ParamScale]:
    out = {}
    for name, terms in growth.weights.items():
        kept = before.get(terms[0].sources[0], UNSCALED) if terms else UNSCALED
        scale = kept.times(added.get(name, UNSCALED))
        if scale != UNSCALED:
            out[name] = scale
    return out


def with_operators(run: RunConfig, index: int, names: tuple[str, ...]) -> RunConfig:
    """Return the run with these operators for the growth of stage `index`."""
    stage = run.stages[index]
    assert stage.growth is not None
    growth = stage.growth.model_copy(update={"operator": list(names), "probe": None})
    stages = list(run.stages)
    stages[index] = stage.model_copy(update={"growth": growth})
    return run.model_copy(update={"stages": stages})


def as_grown(run: RunConfig, state: RunState) -> RunConfig:
    """Return the run with the operators of its past growths and the lengths of `as_trained`.

    Raises InputError if the run file has other operators: masks and hyper-parameters of the stage
    would silently be those of another growth.
    """
    for index, names in enumerate(state.operators, start=1):
        growth = run.stages[index].growth
        if not names or growth is None:
            continue
        allowed = ["+".join(chosen.operator) for chosen in candidates(growth)]
        if "+".join(names) not in allowed:
            raise ConfigError(
                f"stages.{index}.growth names {' or '.join(allowed)}, but the run has grown with "
                f"{'+'.join(names)}; restore it, or use another output_dir"
            )
        run = with_operators(run, index, names)
    return as_trained(run, state)


def as_trained(run: RunConfig, state: RunState) -> RunConfig:
    """Return the run with the lengths of its stages that follow from the tokens trained so far.

    Raises InputError if they leave no tokens for a stage with `at_tokens` or `at_flops`.
    """
    try:
        return settled(run, state.stage, state.stage_tokens, state.finished_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def keys_without_effect(old: RunConfig, new: RunConfig, state: RunState) -> Iterator[str]:
    """Yield the keys of past growths that two runs may set differently without an effect.

    These are keys that no operator of either growth uses, and `operator` and `probe` if one run has
    the probe and the other one the operator that it chose.
    """
    for index, (before, after) in enumerate(zip(old.stages, new.stages, strict=False)):
        sides = [stage.growth for stage in (before, after) if stage.growth is not None]
        if index > state.stage or len(sides) < 2:
            continue
        at = f"stages.{index}.growth"
        yield from (f"{at}.{key}" for key in set.intersection(*map(keys_without_use, sides)))
        names = state.operators[index - 1] if 0 < index <= len(state.operators) else ()
        known = all(list(names) in [c.operator for c in candidates(side)] for side in sides)
        if known and len([side for side in sides if side.probe is not None]) == 1:
            yield from (f"{at}.operator", f"{at}.probe")
