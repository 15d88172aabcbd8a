"""The growths of a run, and what they leave behind for training: pure functions of its config."""

from collections.abc import Mapping

from megagrow.config.schema import RunConfig
from megagrow.growth.check import check_map
from megagrow.growth.map import GrowthMap
from megagrow.growth.operators import follows_exactly, growth_map
from megagrow.parallel.plan import parameter_plan
from megagrow.parallel.scale import UNSCALED, ParamScale


def stage_growth(run: RunConfig, index: int) -> GrowthMap:
    """The map by which stage `index` of a run comes out of the one before; checked."""
    source, stage = run.stages[index - 1], run.stages[index]
    if stage.growth is None:
        raise AssertionError(f"stage {index} has no growth")
    growth = growth_map(source.model, stage.model, stage.growth, f"{run.seed}/stage-{index}")
    check_map(growth, parameter_plan(source.model, tp=1), parameter_plan(stage.model, tp=1))
    return growth


def stage_scales(run: RunConfig, index: int) -> dict[str, ParamScale]:
    """Factors on the hyper-parameters of a stage's parameters, of all growths that led to it.

    A growth that is to follow its source exactly sets them, and later ones pass them on: a
    parameter keeps those of what it is made of.
    """
    scales: dict[str, ParamScale] = {}
    for later in range(1, index + 1):
        options = run.stages[later].growth
        follows = options is not None and follows_exactly(options)
        if scales or follows:
            growth = stage_growth(run, later)
            scales = _passed_on(growth, scales, growth.scales if follows else {})
    return scales


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
