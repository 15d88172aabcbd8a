"""Communication of a rank in a training step by purpose.

The collectives are those of the model (`parallel.tensor_parallel`, `parallel.context`), of the
pipeline (`parallel.pipeline.execution`), of `parallel.flat_optimizer`
under ZeRO 1 and 2 and of DeepSpeed 0.19 otherwise, as observed on gloo ranks in
tests/planning/test_traffic.py. Reduces to the owners of all partitions are a reduce-scatter.
Scalars (norms, losses) are excluded.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megagrow.model.layers.table import (
    EMBEDDING,
    FINAL_NORM,
    BlockDeclaration,
    block_counts,
    norm_gain,
)
from megagrow.parallel.pipeline.split import pipeline_split
from megagrow.parallel.sharding import pad
from megagrow.planning.memory import StageMemory, zero3_options

CollectiveKind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and purpose in one step."""

    purpose: str
    kind: CollectiveKind
    ranks: int
    """Size of the process group."""
    payload: int
    """Bytes of the full tensors that are reduced, gathered or scattered; of an all-to-all or send
    those of the rank's own tensors."""

    @property
    def sent(self) -> int:
        """Bytes sent by each rank of a ring (Patarasuk and Yuan 2009)."""
        if self.kind == "send":
            return self.payload
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.payload * (self.ranks - 1) // self.ranks


def step_traffic(memory: StageMemory) -> list[Traffic]:
    """Return the collectives of a pipeline rank in one step over all micro-batches; empty on one
    rank."""
    parts = (_tensor_parallel, _context_parallel, _pipeline_parallel, _data_parallel)
    return [each for part in parts for each in part(memory)]


def _micro_batches(memory: StageMemory) -> int:
    batch, parallel = memory.stage.batch, memory.stage.parallel
    replicas = parallel.data_parallel_size(memory.layout.world_size)
    return batch.global_batch_size // (batch.micro_batch_size * replicas)


def _tokens(memory: StageMemory) -> int:
    """Return the tokens of a micro-batch on one context-parallel rank."""
    stage = memory.stage
    tokens = stage.batch.micro_batch_size * stage.data.sequence_length
    return tokens // stage.parallel.context_parallel_size


def _width(memory: StageMemory) -> int:
    """Return the bytes of an element of activations.

    Under autocast (ZeRO 0) some tensors are bf16, so fp32 is an upper bound.
    """
    return 2 if memory.bf16 and memory.stage.parallel.zero_stage > 0 else 4


def _blocks(memory: StageMemory) -> Counter[BlockDeclaration]:
    """Return the number of occurrences of each block on the pipeline rank."""
    stage = memory.stage
    split = pipeline_split(stage.model, stage.parallel)
    return block_counts(stage.model, split.layers_of(memory.pp_rank))


def _tensor_parallel(memory: StageMemory) -> Iterator[Traffic]:
    """Yield the collectives before and after each block, after the embedding, before the head."""
    stage, ranks = memory.stage, memory.layout.tp
    if ranks == 1:
        return
    parallel, model, width = stage.parallel, stage.model, _width(memory)
    tokens, micro, blocks = _tokens(memory), _micro_batches(memory), _blocks(memory).total()
    is_first, is_last = memory.pp_rank == 0, memory.pp_rank == memory.layout.pp - 1
    again = blocks if parallel.activation_checkpointing == "full" else 0
    region = micro * tokens * model.hidden_size * width
    regions = (2 * blocks + again + is_first + is_last) * region
    if parallel.sequence_parallel:
        # `selective` gathers the input of each block again with the norm before it.
        recomputed = parallel.activation_checkpointing == "selective"
        inputs = blocks if recomputed and model.norm_position == "pre" else 0
        gathered = regions + inputs * region
        yield Traffic("activations and their gradients", "all-gather", ranks, gathered)
        yield Traffic("activations and their gradients", "reduce-scatter", ranks, regions)
    else:
        yield Traffic("activations and their gradients", "all-reduce", ranks, regions)
    yield from _within_blocks(memory, width)
    if is_last:
        statistics = micro * 3 * 4 * tokens * ranks
        yield Traffic("statistics of the loss", "all-gather", ranks, statistics)


def _within_blocks(memory: StageMemory, width: int) -> Iterator[Traffic]:
    """Yield sums over ranks in blocks, and of gradients of weights that all ranks hold and apply to
    different activations."""
    stage, ranks, micro = memory.stage, memory.layout.tp, _micro_batches(memory)
    model, parallel = stage.model, stage.parallel
    counts, norms = _blocks(memory).items(), _blocks(memory).total()
    tokens = micro * _tokens(memory)
    summed = sum(count * block.type.partial_sums(model, width) for block, count in counts)
    passes = 3 if parallel.activation_checkpointing == "full" else 2
    if summed:
        yield Traffic("partial sums of activations", "all-reduce", ranks, passes * tokens * summed)
    shared = sum(
        count * each.numel(model)
        for block, count in counts
        for each in block.type.parameters(model)
        if not each.is_sliced
    )
    norms += memory.pp_rank == memory.layout.pp - 1
    gain = norm_gain(FINAL_NORM).numel(model)
    shared += norms * gain if parallel.sequence_parallel else 0
    if shared:
        yield Traffic("gradients of norm weights", "all-reduce", ranks, micro * width * shared)


def _context_parallel(memory: StageMemory) -> Iterator[Traffic]:
    """Yield the exchange of each block in the forward pass, again in recomputation, and of its
    gradients in the backward pass."""
    parallel, model = memory.stage.parallel, memory.stage.model
    ranks, micro = parallel.context_parallel_size, _micro_batches(memory)
    if ranks == 1:
        return
    elements = Counter[str]()
    for block, count in _blocks(memory).items():
        each = block.type.context_elements(model, memory.layout.tp, parallel.cp_comm_type)
        elements["gathered"] += count * each.gathered
        elements["exchanged"] += count * each.exchanged
    forwards = 2 if parallel.activation_checkpointing == "full" else 1
    size = micro * _width(memory) * _tokens(memory)
    if gathered := ranks * elements["gathered"] * size:
        yield Traffic("sequence shards of activations", "all-gather", ranks, forwards * gathered)
        yield Traffic("gradients of sequence shards", "reduce-scatter", ranks, gathered)
    if exchanged := elements["exchanged"] * size:
        total = (forwards + 1) * exchanged
        yield Traffic("sequence shards for heads or channels", "all-to-all", ranks, total)


def _pipeline_parallel(memory: StageMemory) -> Iterator[Traffic]:
    """Yield the sends of hidden states and their gradients, and those of a tied head.

    The first rank sends the weight of a tied head, the last one its gradient.
    """
    stage, rank, ranks = memory.stage, memory.pp_rank, memory.layout.pp
    if ranks == 1:
        return
    split = pipeline_split(stage.model, stage.parallel)
    sliced = memory.layout.tp if stage.parallel.sequence_parallel else 1
    size = _micro_batches(memory) * _tokens(memory) * stage.model.hidden_size // sliced
    own, width = split.chunks_of(rank), _width(memory)
    if forward := sum(chunk != split.last_chunk for chunk in own):
        yield Traffic("hidden states to the next chunk", "send", ranks, forward * width * size)
    if backward := sum(chunk != 0 for chunk in own):
        yield Traffic("gradients to the previous chunk", "send", ranks, backward * width * size)
    if stage.model.tie_word_embeddings and rank in (0, ranks - 1):
        rows = memory.layout.plan[EMBEDDING.name].slice_numel(memory.layout.tp)
        purpose = "weight of the tied head" if rank == 0 else "gradient of the tied head"
        yield Traffic(purpose, "send", ranks, rows * (width if rank == 0 else 4))


def _data_parallel(memory: StageMemory) -> Iterator[Traffic]:
    layout, ranks = memory.part, memory.part.dp
    if ranks == 1:
        return
    micro, width = _micro_batches(memory), 2 if memory.bf16 else 4
    summed = memory.stage.parallel.communication_bytes
    sizes = {name: spec.slice_numel(layout.tp) for name, spec in layout.plan.items()}
    total = sum(sizes.values())
    if layout.zero_stage == 0:
        yield Traffic("gradients", "all-reduce", ranks, summed * total)
    elif layout.zero_stage < 3:
        times = micro if layout.zero_stage == 2 else 1
        yield Traffic("gradients", "reduce-scatter", ranks, times * summed * total)
        groups = [sum(sizes[name] for name in group) for group in layout.groups]
        padded = sum(pad(size, 2 * ranks) for size in groups)
        yield Traffic("updated weights", "all-gather", ranks, width * padded)
    else:
        padded_sizes = [pad(size, ranks) for size in sizes.values()]
        kept = zero3_options(memory.stage).stage3_param_persistence_threshold
        large = sum(pad(size, ranks) for size in sizes.values() if size > kept)
        yield Traffic("gradients", "reduce-scatter", ranks, micro * summed * sum(padded_sizes))
        # All passes of a step but the first gather from the ranks of hpZ, if there are any.
        again, near = (2 * micro - 1) * large, memory.stage.parallel.zero_hpz_partition_size
        first = sum(padded_sizes) + (again if near == 1 else 0)
        yield Traffic("weights, at most", "all-gather", ranks, width * first)
        if near > 1:
            yield Traffic("weights, second copy, at most", "all-gather", near, width * again)
