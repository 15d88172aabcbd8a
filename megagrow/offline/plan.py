"""Plan of an offline growth or conversion, made before any tensor is read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagrow.checkpoint.source import Source
from megagrow.config.growth import GrowthConfig
from megagrow.config.load import load_run
from megagrow.config.model_file import is_run_file, load_model
from megagrow.config.overrides import apply_override, refuse_unknown_keys
from megagrow.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.formats.hugging_face_families import export_problems
from megagrow.growth.constraints import Event
from megagrow.growth.map import GrowthMap, identity_map, kept_state
from megagrow.growth.map_checks import check_map
from megagrow.growth.mask_schedule import growth_masks
from megagrow.growth.operators import (
    follows_exactly,
    growth_map,
    is_masked,
    operators_of,
    state_policy,
)
from megagrow.growth.validation import event_problems, unused_keys
from megagrow.model.layers.table import indivisible_sizes
from megagrow.model.masks import Masks
from megagrow.offline.request import Request
from megagrow.parallel.engine_config import parameter_groups
from megagrow.parallel.optimizers.rules import ParamScale, UpdateRule, matrix_rule, source_kind
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Layout
from megagrow.train.config_changes import changes_since
from megagrow.train.growth_event.run_growths import as_grown, stage_scales
from megagrow.train.source_state import STILL_MASKED, state_of, still_masked
from megagrow.train.train_state import RunState

logger = logging.getLogger(__name__)

DEFAULT_SEED = 1234


@dataclass(frozen=True)
class ConversionPlan:
    """Target model of a source, and the growth that leads to it."""

    source: Source
    model: ModelConfig
    options: GrowthConfig | None
    """None for conversions: the same model in other files."""
    stream: str
    """Random stream, equal to that of a training job with the same seed and stage."""
    run: RunConfig | None = None
    stage: int | None = None

    @property
    def before(self) -> str:
        """Name of the source's model in messages."""
        return "source.model" if self.stage is None else f"stages.{self.stage - 1}.model"

    @property
    def here(self) -> str:
        """Name of the target in messages."""
        return "target" if self.stage is None else f"stages.{self.stage}"

    @property
    def operators(self) -> str:
        """Operators in human-readable form."""
        return "none" if self.options is None else "+".join(self.options.operator)

    @property
    def is_masked(self) -> bool:
        """True if new parts are masked, with masks that start at 0."""
        return self.options is not None and is_masked(self.options)

    @property
    def masks(self) -> Masks | None:
        """Masks at the start of the target."""
        if self.options is None:
            return None
        return growth_masks(self.source.model, self.model, self.options, 0, 1)

    @cached_property
    def growth(self) -> GrowthMap:
        """Validated growth map."""
        source, target = self.source.layout.plan, parameter_plan(self.model, 1, self.matrices)
        if self.options is None:
            growth = identity_map(list(target))
        else:
            growth = growth_map(
                self.source.model, self.model, self.options, self.stream, self.matrices
            )
        kinds = [kind for kind in growth.kinds if source_kind(kind, self.source.kinds)]
        growth = kept_state(growth.with_kinds(*kinds), source, target)
        check_map(growth, source, target)
        return growth

    @property
    def matrices(self) -> UpdateRule:
        """Optimizer of the matrices of decoder layers in the target."""
        if self.run is not None and self.stage is not None:
            return matrix_rule(self.run.stages[self.stage].optimizer)
        return self.source.layout.matrices

    def state(self) -> RunState:
        """Return the state of a run that resumes from the target.

        This is the start of the grown stage, with the source's counters.
        """
        state = state_of(self.source)
        if self.options is None:
            return state
        stage = state.stage if self.stage is None else self.stage - 1
        # Earlier growths outside of a run are unknown; each has an empty entry.
        unknown = ((),) * stage
        state = replace(
            state,
            stage=stage,
            provenance=(*state.provenance, *unknown[len(state.provenance) :]),
            operators=(*state.operators, *unknown[len(state.operators) :]),
        )
        return state.after_growth(self.growth.provenance, tuple(self.options.operator))


def make_plan(request: Request, source: Source) -> ConversionPlan:
    """Return the plan of a request. Raises an InputError that lists all problems on one line."""
    plan = _unchecked_plan(request, source)
    form = request.form or form_of(source)
    problems = []
    if plan.options is not None:
        event = Event(source.model, plan.model, plan.options, plan.before, plan.here)
        problems = [*unused_keys(plan.options, f"{plan.here}.growth")] or event_problems(event)
        problems = problems or _needs_training(plan.options, source)
    if plan.is_masked and form == "huggingface":
        problems.append(
            f"{plan.operators} uses growth masks, which a Hugging Face model does not support; "
            "write a checkpoint"
        )
    if form == "huggingface":
        problems += export_problems(plan.model)
    leaves_its_run = plan.options is not None or form == "huggingface"
    if leaves_its_run and still_masked(source):
        problems.append(f"{source.path}: {STILL_MASKED}")
    if problems:
        raise ConfigError("; ".join(problems))
    return plan


def form_of(source: Source) -> str:
    """Return the format of a source."""
    return "huggingface" if source.run is None else "checkpoint"


def _needs_training(options: GrowthConfig, source: Source) -> list[str]:
    live = "grow during training (megagrow train)"
    if any(operator.learned for operator in operators_of(options)):
        return [f"{'+'.join(options.operator)} is trained before it is applied; {live}"]
    if options.probe is not None:
        return [f"growth.probe trains each operator; {live}, or name one operator"]
    if state_policy(options) == "estimate_second_moment" and "exp_avg_sq" in source.kinds:
        return [
            f"growth.optimizer_state = estimate_second_moment requires training batches; "
            f"{live}, or set it to asymmetric"
        ]
    return []


def _unchecked_plan(request: Request, source: Source) -> ConversionPlan:
    if request.to is None:
        return ConversionPlan(source, source.model, None, "")
    stage = state_of(source).stage + 1
    if is_run_file(request.to):
        stage = stage if request.stage is None else request.stage
        return _plan_of_run(request, Path(request.to), source, stage)
    if request.stage is not None:
        raise ConfigError(f"--stage requires a run file, but {request.to} is a model")
    model = load_model(request.to)
    if model == source.model and not request.operators and not request.overrides:
        return ConversionPlan(source, model, None, "")
    seed = request.seed
    if seed is None:
        seed = source.environment.get("config", {}).get("seed", DEFAULT_SEED)
    return ConversionPlan(source, model, growth_options(request), f"{seed}/stage-{stage}")


def _plan_of_run(request: Request, path: Path, source: Source, stage: int) -> ConversionPlan:
    overrides = [f"stages.{stage}.{text}" for text in _growth_only(request)]
    if request.seed is not None:
        overrides.append(f"seed={request.seed}")
    count = len(load_run(path).stages)
    if not 1 <= stage < count:
        raise ConfigError(
            f"{path}: no growth leads to stage {stage}, it has stages 0 to {count - 1}"
        )
    run = load_run(path, overrides)
    if source.run is not None and state_of(source).stage != stage - 1:
        raise CheckpointError(
            f"{source.path} is of stage {state_of(source).stage}; the growth to stage {stage} of "
            f"{path} begins at stage {stage - 1}"
        )
    _warn_of_changes(run, source)
    run = as_grown(run, state_of(source))
    before, found = run.stages[stage - 1].model.model_dump(), source.model.model_dump()
    for key, value in before.items():
        if found[key] != value and key != "initializer_range":
            raise CheckpointError(
                f"{source.path}: {key} is {found[key]}, stage {stage - 1} of {path} has {value}"
            )
    model = run.stages[stage].model
    options = run.stages[stage].growth
    if options is None:
        raise ConfigError(
            f"{path}: stages.{stage} has no growth; train the run, which begins the stage from the "
            "last checkpoint of the previous one"
        )
    return ConversionPlan(source, model, options, f"{run.seed}/stage-{stage}", run, stage)


def _warn_of_changes(run: RunConfig, source: Source) -> None:
    """Log the changes of the run since the source was saved; a resume refuses contradictions."""
    if source.run is not None:
        state = state_of(source)
        for change in changes_since(run, None, state, source.model, source.environment):
            if change.matters:
                logger.warning("config | %s", change)


def growth_options(request: Request) -> GrowthConfig:
    """Return the growth options given on the command line only."""
    tree: dict[str, Any] = {"growth": {}}
    for text in _growth_only(request):
        tree = apply_override(tree, text)
        refuse_unknown_keys({"stages": [tree]}, f"--set {text}")
    try:
        return GrowthConfig.model_validate(tree["growth"])
    except ValidationError as error:
        wrong = [f"growth.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(dict.fromkeys(wrong))) from error


def _growth_only(request: Request) -> list[str]:
    """Return all overrides, including those equivalent to `--operator`."""
    for text in request.overrides:
        if not text.strip().startswith("growth."):
            raise ConfigError(f"--set {text}: only growth.KEY=VALUE can be set here")
    names = [f"growth.operator=[{', '.join(request.operators)}]"] if request.operators else []
    return [*names, *request.overrides]


def target_layout(request: Request, plan: ConversionPlan) -> Layout:
    """Return the layout of the target with the engine's groups. Raises ConfigError if invalid."""
    zero_stage, dp, tp = plan.source.layout.zero_stage, plan.source.layout.dp, plan.source.layout.tp
    decay = _decay(plan.source.layout)
    if plan.run is not None and plan.stage is not None:
        stage = plan.run.stages[plan.stage]
        zero_stage, tp = stage.parallel.zero_stage, stage.parallel.tensor_model_parallel_size
        decay = stage.optimizer.weight_decay_on
    zero_stage = zero_stage if request.zero_stage is None else request.zero_stage
    dp, tp, decay = request.dp or dp, request.tp or tp, request.weight_decay_on or decay
    for name, size in indivisible_sizes(plan.model, tp):
        raise ConfigError(f"--tp {tp} does not divide {name} = {size} of the target")
    parameters = parameter_plan(plan.model, tp, plan.matrices)
    optimizer = OptimizerConfig.model_validate({"lr": 1.0, "weight_decay_on": decay})
    groups = parameter_groups(parameters, optimizer, _scales(plan))
    return Layout(parameters, tuple(group.names for group in groups), zero_stage, dp, tp)


def _scales(plan: ConversionPlan) -> Mapping[str, ParamScale]:
    """Return the key by which the engine separates groups."""
    if plan.run is not None and plan.stage is not None:
        return stage_scales(plan.run, plan.stage)
    follows = plan.options is not None and follows_exactly(plan.options)
    return plan.growth.scales if follows else {}


def _decay(layout: Layout) -> str:
    """Return the parameters with weight decay, from the optimizer groups of a layout."""
    mixed = any(len({layout.plan[n].decays for n in group}) == 2 for group in layout.groups)
    return "all" if mixed else "matrices"
