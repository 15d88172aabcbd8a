"""Plan of a run before it starts: sizes, steps, FLOPs, memory and growths."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from megagrow.config.growth import GrowthConfig
from megagrow.config.growth_guidelines import (
    LARGE_BATCH,
    SPEEDUPS,
    best_batch,
    connection_rate,
    findings,
    growth_tokens,
    outside_fit,
    timing_warnings,
)
from megagrow.config.parallel_rules import world_problems
from megagrow.config.schema import OptimizerConfig, RunConfig, StageConfig
from megagrow.config.stage_length import stage_steps, stage_tokens
from megagrow.errors import ConfigError
from megagrow.growth.operators import is_learned, resolve_operators, state_policy
from megagrow.growth.validation import candidates, growth_problems
from megagrow.model.layers.flops import (
    flops_per_token,
    non_embedding_parameters,
    paper_flops_per_token,
    parameters,
)
from megagrow.planning.memory import StageMemory, stage_memory
from megagrow.planning.memory_fit import (
    RunPeak,
    fit_micro_batches,
    growth_peak,
    memory_warnings,
    run_peak,
)
from megagrow.reshard.traffic import TotalVolume, total_volume
from megagrow.train.growth_event.run_growths import stage_growth, stage_layout
from megagrow.train.schedule import stage_optimizer


@dataclass(frozen=True)
class GrowthPlan:
    """Plan of the growth at the start of a stage."""

    options: GrowthConfig
    factor: float
    """Ratio of non-embedding parameters, after over before: the paper's g."""
    state: str
    """Optimizer-state policy."""
    layers: tuple[int, ...]
    """Source layer of each layer, -1 for none."""
    connection_rate: float
    advised_tokens: float
    """Tokens that equation 2 of the paper recommends before the growth."""
    outside_fit: str | None
    """Reason why `advised_tokens` is an extrapolation, or None if it is not."""
    peak_bytes: int
    """Peak bytes of the growth on the rank with the largest share."""
    volume: TotalVolume | None
    """Bytes between ranks; None if the operator is learned or searched during the run."""


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage. Tokens are those of complete steps."""

    config: StageConfig
    parameters: int
    non_embedding: int
    tokens: int
    steps: int
    step_tokens: int
    flops: int
    """FLOPs by the paper's account, 6 x parameters x tokens."""
    flops_true: int
    optimizer: OptimizerConfig
    """Optimizer settings with the effective learning rates."""
    memory: StageMemory
    growth: GrowthPlan | None


@dataclass(frozen=True)
class PlannedSaving:
    """Expected saving compared with the last model from scratch, by the paper's figures.

    Each pair corresponds to the lower and upper end of `growth_guidelines.SPEEDUPS`.
    """

    scratch_flops: tuple[float, float]
    """FLOPs of training from scratch to the same loss."""
    speedup: tuple[float, float]
    """`scratch_flops` over all FLOPs of this run, bases charged in full, - 1."""
    saved: tuple[float, float]
    """Fraction of `scratch_flops` that is saved."""


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run on `world_size` ranks."""

    run: RunConfig
    world_size: int
    bf16: bool
    stages: tuple[StagePlan, ...]
    peak: RunPeak
    saving: PlannedSaving | None
    """None if the paper has no figure, i.e. for anything but one growth by stacking to a larger
    model."""
    warnings: tuple[str, ...]

    @property
    def flops(self) -> int:
        """FLOPs of all stages by the paper's account."""
        return sum(stage.flops for stage in self.stages)


def plan_run(run: RunConfig, world_size: int, gpu_memory: int | None = None) -> RunPlan:
    """Return the plan of a run on `world_size` ranks, with warnings if it exceeds `gpu_memory`.

    `gpu_memory` is in bytes; `micro_batch_size: auto` needs it. `precision: auto` is planned as
    bf16, as on a GPU. Raises ConfigError if the run could not start.
    """
    if world_size < 1:
        raise ConfigError(f"--world {world_size}: use 1 or more ranks")
    problems = growth_problems(run) or world_problems(run, world_size)
    if problems:
        raise ConfigError("; ".join(problems))
    bf16 = run.precision != "fp32"
    run = fit_micro_batches(run, world_size, gpu_memory, bf16)
    memories = [stage_memory(stage, world_size, bf16) for stage in run.stages]
    stages = tuple(_stage(run, index, memories) for index in range(len(run.stages)))
    growths = [None, *(growth_peak(*pair) for pair in pairwise(memories))]
    warnings = [*timing_warnings(run), *_warnings(run, stages)]
    if gpu_memory is not None:
        warnings += memory_warnings(memories, growths, gpu_memory)
    peak = run_peak(memories, growths)
    return RunPlan(run, world_size, bf16, stages, peak, _saving(stages), tuple(warnings))


def _stage(run: RunConfig, index: int, memories: list[StageMemory]) -> StagePlan:
    stage = run.stages[index]
    tokens = stage_tokens(stage)
    return StagePlan(
        config=stage,
        parameters=parameters(stage.model),
        non_embedding=non_embedding_parameters(stage.model),
        tokens=tokens,
        steps=stage_steps(stage),
        step_tokens=stage.batch.global_batch_size * stage.data.sequence_length,
        flops=paper_flops_per_token(stage.model) * tokens,
        flops_true=flops_per_token(stage.model, stage.data.sequence_length) * tokens,
        optimizer=stage_optimizer(run, index),
        memory=memories[index],
        growth=_growth(run, index, memories),
    )


def _growth(run: RunConfig, index: int, memories: list[StageMemory]) -> GrowthPlan | None:
    stage, options = run.stages[index], run.stages[index].growth
    if options is None:
        return None
    source = run.stages[index - 1].model
    size = non_embedding_parameters(stage.model)
    depth = resolve_operators(source, stage.model, options, "").depth
    layers = tuple(-1 if layer.source is None else layer.source for layer in depth.layers)
    return GrowthPlan(
        options=options,
        factor=size / non_embedding_parameters(source),
        state=state_policy(options),
        layers=layers,
        connection_rate=connection_rate(layers),
        advised_tokens=growth_tokens(size, stage.tokens),
        outside_fit=outside_fit(size, stage.tokens),
        peak_bytes=growth_peak(memories[index - 1], memories[index]),
        volume=_volume(run, index, memories[index].layout.world_size),
    )


def _volume(run: RunConfig, index: int, world_size: int) -> TotalVolume | None:
    options = run.stages[index].growth
    if options is None or is_learned(options) or len(candidates(options)) > 1:
        return None
    source, target = (stage_layout(run, at, world_size) for at in (index - 1, index))
    return total_volume(source, stage_growth(run, index), target)


def _saving(stages: tuple[StagePlan, ...]) -> PlannedSaving | None:
    """Return the expected saving.

    The paper counts d tokens of the base as d / g of the target; here the base is charged in full,
    embeddings included, so the speedup is lower.
    """
    if len(stages) != 2 or not _is_gstack(stages[1]):
        return None
    base, target = stages
    if target.non_embedding <= base.non_embedding:
        return None
    as_target = base.tokens * base.non_embedding / target.non_embedding
    counted = target.flops * (1 + as_target / target.tokens)
    spent = base.flops + target.flops
    low, high = (counted * (1 + speedup) for speedup in SPEEDUPS)
    return PlannedSaving(
        scratch_flops=(low, high),
        speedup=(low / spent - 1, high / spent - 1),
        saved=(1 - spent / low, 1 - spent / high),
    )


def _is_gstack(stage: StagePlan) -> bool:
    growth = stage.growth
    if growth is None or growth.options.operator != ["direct_depth"]:
        return False
    base = max(growth.layers) + 1
    return list(growth.layers) == [i % base for i in range(len(growth.layers))]


def _warnings(run: RunConfig, stages: tuple[StagePlan, ...]) -> Iterator[str]:
    for index, stage in enumerate(stages):
        if stage.growth is not None:
            yield from _growth_warnings(run, index, stages[index - 1], stage.growth)
        if index + 1 < len(stages):
            yield from _batch_warnings(index, stage)


def _growth_warnings(
    run: RunConfig, index: int, base: StagePlan, growth: GrowthPlan
) -> Iterator[str]:
    if growth.outside_fit and not base.config.tokens_auto:  # auto: see timing_warnings
        yield (
            f"stages.{index}: equation 2 is outside its fitted range for this growth: "
            f"{growth.outside_fit}"
        )
    yield from findings(run, index, growth.factor)


def _batch_warnings(index: int, stage: StagePlan) -> Iterator[str]:
    best = best_batch(stage.non_embedding, stage.tokens)
    if stage.step_tokens > LARGE_BATCH * best:
        yield (
            f"stages.{index}.batch: {stage.step_tokens:,} tokens per step are "
            f"{stage.step_tokens / best:.1f} times the best batch for this budget, "
            f"{best:,.0f} tokens by the fit of DeepSeek LLM (arXiv 2401.02954)"
        )
