"""Whether a run's stages and growths fit into the memory of a GPU, and what to try if not."""

from collections.abc import Iterator, Sequence

from megagrow.common.sizes import format_in
from megagrow.planning.memory import StageMemory


def memory_warnings(
    memories: Sequence[StageMemory], growths: Sequence[int | None], capacity: int
) -> Iterator[str]:
    """One for each stage, and for each growth, that takes more than `capacity` bytes.

    `growths` are the peaks of the growths by which the stages begin.
    """
    for index, (memory, growth) in enumerate(zip(memories, growths, strict=True)):
        needed = on_gpu(memory)
        if needed > capacity:
            part, size = largest_part(memory)
            yield (
                f"stages.{index} does not fit: {_gb(needed)} of {_gb(capacity)} per GPU; most of "
                f"it are {part}, {_gb(size)}; try {', '.join(remedies(memory))}"
            )
        if growth is not None and growth > capacity:
            yield (
                f"stages.{index}: the growth by which it begins does not fit: {_gb(growth)} of "
                f"{_gb(capacity)} per GPU; try more ranks, or `megagrow grow` from file to file"
            )


def on_gpu(memory: StageMemory) -> int:
    """Bytes of a step on the GPU: an offloaded optimizer keeps its state on the CPU."""
    offloaded = memory.stage.parallel.offload_optimizer
    return memory.training - (memory.state if offloaded else 0)


def largest_part(memory: StageMemory) -> tuple[str, int]:
    """What takes most in that moment of a step that is the higher one, and its bytes."""
    parts = {"forward weights": memory.weights}
    if not memory.stage.parallel.offload_optimizer:
        parts["fp32 masters and moments"] = memory.state
    if memory.at_loss >= memory.at_end:
        parts["gathered weights"] = memory.gathered
        parts["activations"] = memory.activations_used
        parts["logits"] = memory.logits
        parts["gradients"] = memory.gradients_kept
    else:
        parts["gradients and their buckets"] = memory.gradients + memory.buckets
    return max(parts.items(), key=lambda part: part[1])


def remedies(memory: StageMemory) -> Iterator[str]:
    """What the stage does not do yet of all that would take less, by what its highest moment is."""
    stage, layout = memory.stage, memory.layout
    if memory.at_loss >= memory.at_end:
        if stage.parallel.activation_checkpointing != "full":
            yield "activation_checkpointing: full"
        if stage.batch.micro_batch_size > 1:
            yield "a smaller micro_batch_size"
        if not stage.kernels.linear_cross_entropy:
            yield "kernels.linear_cross_entropy"
    if layout.zero_stage < 3 and layout.dp > 1:
        yield f"zero_stage: {layout.zero_stage + 1} or higher"
    yield "a larger tensor_model_parallel_size" if layout.dp > 1 else "more ranks"


def _gb(size: int) -> str:
    return f"{format_in(size, 'GB', 1)} GB"
