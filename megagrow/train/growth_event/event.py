"""Growth event: transfer of one stage's state to the next between ranks of the running job.

The transition to a stage without growth is the identity map.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.distributed as dist

from megagrow.config.growth import GrowthConfig
from megagrow.config.growth_guidelines import connection_rate
from megagrow.config.schema import RunConfig
from megagrow.data.batches import Batch
from megagrow.errors import ConfigError
from megagrow.growth.map import GrowthMap, kept_state
from megagrow.growth.operators import is_learned, state_policy
from megagrow.model.masks import Masks
from megagrow.reshard.dense import exchange_dense
from megagrow.reshard.exchange import ShardedState, TransferStats, exchange
from megagrow.reshard.fill import fill_new
from megagrow.train.growth_event.cost import Feed, GrowthCost, spent_on_steps
from megagrow.train.growth_event.ligo_trainer import learn_growth
from megagrow.train.growth_event.run_growths import stage_growth
from megagrow.train.kernel_calls import Checks
from megagrow.train.stage import Stage, build_stage, masks_now
from megagrow.train.step import peak_memory, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GrowthReport:
    """Description and cost of a growth over all ranks."""

    operator: tuple[str, ...]
    """Empty for a stage without growth."""
    layers: tuple[int, ...]
    """Source layer of each layer, -1 for none; empty for a stage without growth."""
    connection_rate: float
    optimizer_state: str
    preserves_function: bool
    bytes_between_ranks: int
    bytes_between_pipeline_ranks: int
    """Those of `bytes_between_ranks` to other pipeline ranks; 0 without pipeline parallelism."""
    bytes_within_ranks: int
    seconds: float
    peak_memory_bytes: int
    """Maximum over all ranks."""
    spent: GrowthCost


@dataclass(frozen=True)
class FinishedStage:
    """State of a finished stage and its layout."""

    index: int
    state: ShardedState
    adam_step: int
    device: torch.device
    checks: Checks = field(default_factory=dict)


def end_stage(stage: Stage) -> FinishedStage:
    """Destroy a stage's engine and keep its state. Collective."""
    step = stage.engine.adam_step
    state = ShardedState(stage.layout, stage.release())
    return FinishedStage(stage.index, state, step, stage.topology.device, stage.checks)


def grow(run: RunConfig, ended: FinishedStage, feed: Feed) -> tuple[Stage, GrowthReport]:
    """Build the next stage with the grown state of a finished one. Collective.

    The state of the finished stage is unchanged.
    """
    begin = time.perf_counter()
    source, stage = run.stages[ended.index : ended.index + 2]
    options = stage.growth
    growth, spent = _map_of(run, ended, options, feed)
    target = build_stage(run, ended.index + 1, ended.device, ended.checks)
    growth = kept_state(growth, ended.state.layout.plan, target.layout.plan)
    _log_optimizers(source.optimizer.type, stage.optimizer.type, growth)
    fill_new(growth, target.layout, target.topology.rank, target.engine.storage())
    moved, measuring = _move(run, ended, options, growth, target, feed)
    spent = spent.plus(measuring)
    return target, _report(target, options, growth, moved, spent, time.perf_counter() - begin)


def _log_optimizers(before: str, after: str, growth: GrowthMap) -> None:
    if before != after:
        state = "its momentum is the first moment" if growth.keeps_step else "its state starts at 0"
        logger.info("optimizer %s -> %s | %s", before, after, state)


def _map_of(
    run: RunConfig, ended: FinishedStage, options: GrowthConfig | None, feed: Feed
) -> tuple[GrowthMap, GrowthCost]:
    """Return the growth map and its cost, which is zero unless it is learned."""
    if options is not None and is_learned(options):
        target = (run, ended.index + 1)
        return learn_growth(*target, ended.state, ended.device, feed, ended.checks)
    return stage_growth(run, ended.index + 1), GrowthCost()


def _move(
    run: RunConfig,
    ended: FinishedStage,
    options: GrowthConfig | None,
    growth: GrowthMap,
    target: Stage,
    feed: Feed,
) -> tuple[list[TransferStats], GrowthCost]:
    """Fill the target's state and return the transfer statistics and the cost.

    If exp_avg_sq of new entries is measured, weights are transferred first. The moments of old
    entries are transferred after the measurement and overwrite its values.
    """
    side = ShardedState(target.layout, target.engine.storage())
    step = ended.adam_step if growth.keeps_step else 0
    # A second moment at step 0 would be divided by the bias of one step.
    estimates = options is not None and state_policy(options) == "estimate_second_moment"
    if options is None or not estimates or not growth.keeps_step:
        moved = [_moved(ended.state, growth, side)]
        target.engine.ready(step)
        return moved, GrowthCost()
    moved = [_moved(ended.state, growth.with_kinds("fp32"), side)]
    target.engine.ready(step)
    steps = range(options.second_moment_batches)
    batches = [feed.batches(n, target.config, target.topology, target.ops) for n in steps]
    measure_second_moment(target, batches, masks_now(run, target, stage_tokens=0))
    moments = [kind for kind in growth.kinds if kind != "fp32"]
    moved.append(_moved(ended.state, growth.with_kinds(*moments), side))
    return moved, spent_on_steps(target.config, len(steps))


def _moved(source: ShardedState, growth: GrowthMap, target: ShardedState) -> TransferStats:
    return exchange(source, growth, target).plus(exchange_dense(source, growth, target))


def _policy(options: GrowthConfig | None, growth: GrowthMap) -> str:
    """Return the policy that was applied to the optimizer state."""
    if not growth.keeps_step:
        return "reset"
    return "transport" if options is None else state_policy(options)


def _report(
    target: Stage,
    options: GrowthConfig | None,
    growth: GrowthMap,
    parts: list[TransferStats],
    spent: GrowthCost,
    seconds: float,
) -> GrowthReport:
    moved, device = reduce(TransferStats.plus, parts), target.topology.device
    counts = (moved.bytes_sent, moved.bytes_between_pipeline_ranks, moved.bytes_local)
    sums = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    peak = torch.tensor([peak_memory(device)], dtype=torch.int64, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    between, pipelines, within = sums.tolist()
    return GrowthReport(
        () if options is None else tuple(options.operator),
        growth.provenance,
        connection_rate(growth.provenance),
        _policy(options, growth),
        growth.preserves_function,
        between,
        pipelines,
        within,
        seconds,
        int(peak),
        spent,
    )


def measure_second_moment(
    stage: Stage, steps: Sequence[Sequence[Batch]], masks: Masks | None
) -> None:
    """Estimate Adam's second moment: set exp_avg_sq to the mean of g^2 over some steps' batches.

    With exp_avg_sq at zero the first updates of new entries would be too large where beta2 is near
    1 (docs/reference/operators.md). Policy `estimate_second_moment` estimates it by steps that do
    not change the weights. Collective.

    The engine must hold its weights, and moments of zero. Each of `steps` contains this rank's
    micro-batches of one step, as for `train_step`; `masks` are those of the stage's first step. The
    gradients are Adam's input, reduced and clipped. Later steps have a larger weight, as in Adam's
    running mean, and the bias is corrected: v = sum over k of (1 - b) b^(n-k) g_k^2 / (1 - b^n),
    with b = beta2. Non-finite gradients are skipped. Weights and Adam's step do not change;
    exp_avg is zero, and so is the momentum of Muon, which has no second moment. Raises InputError
    if no gradient is finite.
    """
    engine = stage.engine
    adam_step = engine.adam_step
    engine.set_update_factors()
    norms = [train_step(stage, batches, lr=0.0, masks=masks)[1] for batches in steps]
    finite = int(torch.stack(norms).isfinite().sum())
    if not finite:
        raise ConfigError(
            f"growth of stage {stage.index}: estimate_second_moment found no finite gradient"
        )
    bias = 1.0 - stage.config.optimizer.betas[1] ** finite
    for kinds in engine.storage().values():
        for kind, values in kinds.items():
            if kind == "exp_avg_sq":
                values.div_(bias)
            elif kind != "fp32":
                values.zero_()
    engine.ready(adam_step)
