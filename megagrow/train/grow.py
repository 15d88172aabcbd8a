"""The growth event: one stage's state becomes the next one's, rank to rank, in the running job."""

import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.growth.check import check_map
from megagrow.growth.map import GrowthMap
from megagrow.growth.operators import growth_map, is_learned, state_policy
from megagrow.parallel.plan import parameter_plan
from megagrow.reshard.exchange import Side, exchange
from megagrow.train.learn import Feed, Spent, learn_growth
from megagrow.train.memory import peak_memory
from megagrow.train.stage import Stage, build_stage


@dataclass(frozen=True)
class GrowthReport:
    """What a growth cost, over all ranks."""

    operator: str
    layers: tuple[int, ...]
    optimizer_state: str
    preserves_function: bool
    bytes_between_ranks: int
    bytes_within_ranks: int
    seconds: float
    peak_memory_bytes: int
    """Highest of all ranks."""
    tokens_used: int = 0
    """Of the training stream, by a growth that was trained itself."""
    flops_used: float = 0.0
    """By that training; by the paper's account, and as they were done."""
    flops_true_used: float = 0.0
    learning_losses: tuple[float, float] | None = None
    """Of the first and the last step of that training."""


@dataclass(frozen=True)
class Ended:
    """What is left of a stage that has ended: its state, where it lies, and nothing else."""

    index: int
    state: Side
    adam_step: int
    device: torch.device


def end_stage(stage: Stage) -> Ended:
    """Destroys a stage's engine and keeps its state; all ranks together."""
    step = stage.engine.adam_step
    return Ended(stage.index, Side(stage.layout, stage.release()), step, stage.topology.device)


def grow(run: RunConfig, stage: Stage, feed: Feed | None = None) -> tuple[Stage, GrowthReport]:
    """Ends a stage and returns the next one, holding the grown state; all ranks together.

    The source is kept until the target is filled; the 16-bit weights, gradients and buffers of the
    source engine are freed before the target is built. A learned growth reads from `feed`.
    """
    return grow_from(run, end_stage(stage), feed)


def grow_from(run: RunConfig, ended: Ended, feed: Feed | None = None) -> tuple[Stage, GrowthReport]:
    """The next stage out of one that has ended, which stays as it is."""
    begin = time.perf_counter()
    growth, spent = _growth(run, ended, feed)
    target = build_stage(run, ended.index + 1, ended.device)
    moved = exchange(ended.state, growth, Side(target.layout, target.engine.storage()))
    target.engine.ready(ended.adam_step if growth.keeps_step else 0)
    seconds = time.perf_counter() - begin
    report = _report(target, growth, moved.bytes_sent, moved.bytes_local, seconds)
    return target, _charged(report, spent)


def _growth(run: RunConfig, ended: Ended, feed: Feed | None) -> tuple[GrowthMap, Spent]:
    """The map, and what it took to find it: nothing, if it is not learned."""
    options = run.stages[ended.index + 1].growth
    if options is None or not is_learned(options):
        return stage_growth(run, ended.index + 1), Spent()
    if feed is None:
        raise AssertionError("a learned growth needs to read the stream")
    return learn_growth(run, ended.index + 1, ended.state, ended.device, feed)


def _charged(report: GrowthReport, spent: Spent) -> GrowthReport:
    return replace(
        report,
        tokens_used=spent.tokens,
        flops_used=spent.flops,
        flops_true_used=spent.flops_true,
        learning_losses=(spent.losses[0], spent.losses[-1]) if spent.losses else None,
    )


def stage_growth(run: RunConfig, index: int) -> GrowthMap:
    """The map by which stage `index` of a run comes out of the one before; checked."""
    source, stage = run.stages[index - 1], run.stages[index]
    if stage.growth is None:
        raise AssertionError(f"stage {index} has no growth")
    growth = growth_map(source.model, stage.model, stage.growth, f"{run.seed}/stage-{index}")
    check_map(growth, parameter_plan(source.model, tp=1), parameter_plan(stage.model, tp=1))
    return growth


def _report(
    target: Stage, growth: GrowthMap, sent: int, local: int, seconds: float
) -> GrowthReport:
    device = target.topology.device
    sums = torch.tensor([sent, local], dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    peak = torch.tensor([peak_memory(device)], dtype=torch.int64, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    growth_config = target.config.growth
    assert growth_config is not None
    operator = "+".join(growth_config.operator)
    between, within = sums.tolist()
    return GrowthReport(
        operator,
        growth.provenance,
        state_policy(growth_config),
        growth.preserves_function,
        between,
        within,
        seconds,
        int(peak),
    )
