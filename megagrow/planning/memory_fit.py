"""Peak memory of a run, remedies for what does not fit into a GPU, and `micro_batch_size: auto`."""

import logging
import math
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megagrow.common.gpu_specs import known_gpu
from megagrow.common.sizes import format_in
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.errors import ConfigError
from megagrow.model.backends import uses_bf16
from megagrow.planning.memory import StageMemory, stage_memory
from megagrow.reshard.exchange import BUCKET_BYTES

logger = logging.getLogger(__name__)

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container, in bytes or `max` (cgroup v2)."""

USABLE = 0.92
"""Fraction of a card's memory available to a run; the rest is used by the driver, NCCL and
allocator fragmentation (docs/guides/planning.md: 5 of 80 GB before the first tensor)."""


@dataclass(frozen=True)
class RunPeak:
    """Peak memory of a run on one GPU."""

    size: int
    """Bytes."""
    stage: int
    rank: int | None
    """First rank with the largest share; None if the growth at the start of the stage is the
    peak."""


def growth_peak(source: StageMemory, target: StageMemory) -> int:
    """Return the peak bytes of a growth over ranks: source shard, target shard and one bucket.

    The additional parameter that dense operators hold is not included.
    """
    ranks = range(target.layout.world_size)
    shares = (source.state_of(rank) + target.share(rank) for rank in ranks)
    return max(shares) + BUCKET_BYTES


def run_peak(memories: Sequence[StageMemory], growths: Sequence[int | None]) -> RunPeak:
    """Return the largest peak of the stages and of the growths at their starts.

    `growths` are as in `memory_warnings`.
    """
    peaks = [
        RunPeak(on_gpu(memory), index, memory.fullest_rank) for index, memory in enumerate(memories)
    ]
    peaks += [RunPeak(size, index, None) for index, size in enumerate(growths) if size is not None]
    return max(peaks, key=lambda peak: peak.size)


def memory_warnings(
    memories: Sequence[StageMemory], growths: Sequence[int | None], capacity: int
) -> Iterator[str]:
    """Yield a warning for each stage and each growth that needs more than `capacity` bytes.

    `growths` are the peak bytes of the growth at the start of each stage.
    """
    for index, (memory, growth) in enumerate(zip(memories, growths, strict=True)):
        needed = on_gpu(memory)
        if needed > capacity:
            part, size = largest_part(memory)
            yield (
                f"stages.{index} does not fit: {_of(needed, capacity)} per GPU; largest part: "
                f"{part}, {_gib(size)} GiB; try {', '.join(remedies(memory))}"
            )
        if growth is not None and growth > capacity:
            event = "transition" if memory.stage.growth is None else "growth"
            yield (
                f"stages.{index}: the {event} at its start does not fit: {_of(growth, capacity)} "
                "per GPU; try more ranks, or `megagrow grow` from file to file"
            )


def on_gpu(memory: StageMemory) -> int:
    """Return the bytes of a step on the GPU, without the state of an offloaded optimizer."""
    offloaded = memory.stage.parallel.offload_optimizer
    return memory.training - (memory.state if offloaded else 0)


def largest_part(memory: StageMemory) -> tuple[str, int]:
    """Return the largest part at the peak of a step, and its bytes."""
    parts = {"forward weights": memory.weights}
    if not memory.stage.parallel.offload_optimizer:
        parts["fp32 masters and moments"] = memory.state
    if memory.at_loss >= memory.at_end:
        parts["gathered weights"] = memory.gathered
        parts["activations"] = memory.activations()
        parts["logits"] = memory.logits
        parts["gradients"] = memory.gradients_kept
    else:
        parts["gradients and their buckets"] = memory.gradients + memory.buckets
    return max(parts.items(), key=lambda part: part[1])


def remedies(memory: StageMemory) -> Iterator[str]:
    """Yield unused settings that reduce the peak of the stage."""
    stage, layout = memory.stage, memory.layout
    if memory.at_loss >= memory.at_end:
        stronger = {"none": "selective or full", "selective": "full"}
        if better := stronger.get(stage.parallel.activation_checkpointing):
            yield f"activation_checkpointing: {better}"
        if stage.batch.micro_batch_size > 1:
            yield "a smaller micro_batch_size"
        if not stage.kernels.linear_cross_entropy:
            yield "kernels.linear_cross_entropy"
    most = 2 if stage.parallel.is_pipeline else 3
    if layout.zero_stage < most and layout.dp > 1:
        yield f"zero_stage: {layout.zero_stage + 1}" + " or higher" * (layout.zero_stage + 1 < most)
    if layout.dp == stage.parallel.context_parallel_size:
        yield "more ranks"
        return
    yield "a larger tensor_model_parallel_size"
    part, _ = largest_part(memory)
    if part == "activations" and stage.batch.micro_batch_size == 1:
        yield "a larger context_parallel_size"
    elif part not in ("activations", "logits") and layout.zero_stage < 3:
        yield "a larger pipeline_model_parallel_size"


def _of(size: int, capacity: int) -> str:
    return f"{_gib(size)} of {_gib(capacity)} GiB"


def _gib(size: int) -> str:
    return format_in(size, "GiB", 1)


def fit_micro_batches(
    run: RunConfig, world_size: int, capacity: int | None, bf16: bool, on_cpu: bool = False
) -> RunConfig:
    """Return the run with a number in place of each `micro_batch_size: auto`, and log the numbers.

    The number of a stage is the largest whose predicted step uses at most `USABLE` of `capacity`.

    Args:
        run: the run, valid on `world_size` ranks with a micro-batch of 1.
        world_size: number of ranks.
        capacity: bytes of one device, or None if unknown.
        bf16: the forward pass runs in bf16.
        on_cpu: ranks without a GPU.

    Raises:
        ConfigError: the memory is unknown, or a micro-batch of 1 does not fit.
    """
    stages = [
        _fitted(stage, index, world_size, capacity, bf16, on_cpu)
        if stage.batch.micro_batch_size_auto
        else stage
        for index, stage in enumerate(run.stages)
    ]
    return run.model_copy(update={"stages": stages})


def _fitted(
    stage: StageConfig, index: int, world_size: int, capacity: int | None, bf16: bool, on_cpu: bool
) -> StageConfig:
    key = f"stages.{index}.batch.micro_batch_size = auto"
    if capacity is None:
        raise ConfigError(f"{key} needs the memory of a GPU; pass --gpu, or set a number")
    memory = stage_memory(stage, world_size, bf16, on_cpu)
    for size in _micro_batches(stage, stage.parallel.data_parallel_size(world_size)):
        batch = stage.batch.model_copy(update={"micro_batch_size": size})
        memory = replace(memory, stage=stage.model_copy(update={"batch": batch})).at_peak
        needed = memory.training if on_cpu else on_gpu(memory)
        if needed <= USABLE * capacity:
            of = _of(needed, capacity)
            logger.info("stage %d | micro_batch_size auto: %d | %s predicted", index, size, of)
            return memory.stage
    raise ConfigError(
        f"{key}: a micro-batch of 1 does not fit: {_of(needed, capacity)} predicted, at most "
        f"{USABLE:.0%} may be used; try {', '.join(remedies(memory))}"
    )


def _micro_batches(stage: StageConfig, dp: int) -> Iterator[int]:
    """Yield the micro-batch sizes that divide every batch of the stage, from large to small."""
    ramp = stage.batch.rampup_batch_size or ()
    most = math.gcd(stage.batch.global_batch_size, *ramp[:2]) // dp
    yield from (size for size in range(most, 0, -1) if most % size == 0)


def fit_to_devices(run: RunConfig, device: torch.device) -> RunConfig:
    """Return `fit_micro_batches` of a starting run, the same on all ranks. Collective.

    The capacity is the smallest memory of a rank. Ranks on CPUs share their host's equally.
    """
    if not any(stage.batch.micro_batch_size_auto for stage in run.stages):
        return run
    ranks = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), _device_memory(device)))
    on_cpu = device.type == "cpu"
    sharing = Counter(host for host, _ in ranks)
    capacity = min(size // (sharing[host] if on_cpu else 1) for host, size in ranks)
    return fit_micro_batches(run, len(ranks), capacity, uses_bf16(run, device), on_cpu)


def _device_memory(device: torch.device) -> int:
    """Return the bytes of a GPU, at most those of its data sheet as in a plan, or of the host."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        known = known_gpu(found.name)
        listed = None if known is None else known.memory
        return min(found.total_memory, listed or found.total_memory)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no cgroup v2, or `max`
        size = min(size, int(_CGROUP_LIMIT.read_text(encoding="ascii")))
    return size
