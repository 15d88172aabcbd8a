"""Peak memory of a run, and remedies for stages and growths that do not fit into a GPU."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megagrow.common.sizes import format_in
from megagrow.planning.memory import StageMemory

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
    if layout.zero_stage < 3 and layout.dp > 1:
        yield f"zero_stage: {layout.zero_stage + 1} or higher"
    yield "a larger tensor_model_parallel_size" if layout.dp > 1 else "more ranks"


def _of(size: int, capacity: int) -> str:
    return f"{_gib(size)} of {_gib(capacity)} GiB"


def _gib(size: int) -> str:
    return format_in(size, "GiB", 1)
