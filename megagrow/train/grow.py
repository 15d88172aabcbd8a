"""The growth event: one stage's state becomes the next one's, rank to rank, in the running job."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.growth.map import GrowthMap
from megagrow.growth.operators import state_policy
from megagrow.reshard.exchange import Side, exchange
from megagrow.train.growths import stage_growth
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


def grow(run: RunConfig, stage: Stage) -> tuple[Stage, GrowthReport]:
    """Ends a stage and returns the next one, holding the grown state; all ranks together.

    The source is kept until the target is filled; the 16-bit weights, gradients and buffers of the
    source engine are freed before the target is built.
    """
    return grow_from(run, end_stage(stage))


def grow_from(run: RunConfig, ended: Ended) -> tuple[Stage, GrowthReport]:
    """The next stage out of one that has ended, which stays as it is."""
    begin = time.perf_counter()
    growth = stage_growth(run, ended.index + 1)
    target = build_stage(run, ended.index + 1, ended.device)
    moved = exchange(ended.state, growth, Side(target.layout, target.engine.storage()))
    target.engine.ready(ended.adam_step if growth.keeps_step else 0)
    seconds = time.perf_counter() - begin
    return target, _report(target, growth, moved.bytes_sent, moved.bytes_local, seconds)


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
