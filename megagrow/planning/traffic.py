"""Communication of a rank in a training step by purpose, and the time of collectives.

The collectives are those of the model (`parallel.tensor_parallel`), of `parallel.flat_optimizer`
under ZeRO 1 and 2 and of DeepSpeed 0.19 otherwise, as observed on gloo ranks in
tests/planning/test_traffic.py. Reduces to the owners of all partitions are a reduce-scatter.
Scalars (norms, losses) are excluded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megagrow.model.layers.flops import norm_parameters
from megagrow.model.layers.table import block_counts
from megagrow.parallel.sharding import pad
from megagrow.planning.cluster import Cluster
from megagrow.planning.memory import StageMemory, zero3_options
from megagrow.planning.step_rates import COLLECTIVE_SECONDS, NIC_SHARE, NVLINK_SHARE

CollectiveKind = Literal["all-reduce", "all-gather", "reduce-scatter"]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and purpose in one step."""

    purpose: str
    kind: CollectiveKind
    ranks: int
    """Size of the process group."""
    payload: int
    """Bytes of the full tensors that are reduced, gathered or scattered."""

    @property
    def sent(self) -> int:
        """Bytes sent by each rank of a ring (Patarasuk and Yuan 2009)."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.payload * (self.ranks - 1) // self.ranks


def step_traffic(memory: StageMemory) -> list[Traffic]:
    """Return the collectives of one step over all micro-batches; empty on one rank."""
    return [*_tensor_parallel(memory), *_data_parallel(memory)]


def _micro_batches(memory: StageMemory) -> int:
    batch = memory.stage.batch
    return batch.global_batch_size // (batch.micro_batch_size * memory.layout.dp)


def _tensor_parallel(memory: StageMemory) -> Iterator[Traffic]:
    """Yield the collectives before and after each block, after the embedding, before the head."""
    stage, ranks = memory.stage, memory.layout.tp
    if ranks == 1:
        return
    parallel, model = stage.parallel, stage.model
    # Under autocast (ZeRO 0) some tensors are bf16, so fp32 is an upper bound.
    width = 2 if memory.bf16 and parallel.zero_stage > 0 else 4
    tokens = stage.batch.micro_batch_size * stage.data.sequence_length
    micro, blocks = _micro_batches(memory), block_counts(model).total()
    again = blocks if parallel.activation_checkpointing == "full" else 0
    region = micro * tokens * model.hidden_size * width
    regions = (2 * blocks + again + 2) * region
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
    statistics = micro * 3 * 4 * tokens * ranks
    yield Traffic("statistics of the loss", "all-gather", ranks, statistics)


def _within_blocks(memory: StageMemory, width: int) -> Iterator[Traffic]:
    """Yield sums over ranks in blocks, and of gradients of weights that all ranks hold and apply to
    different activations."""
    stage, ranks, micro = memory.stage, memory.layout.tp, _micro_batches(memory)
    model, parallel = stage.model, stage.parallel
    counts = block_counts(model).items()
    tokens = micro * stage.batch.micro_batch_size * stage.data.sequence_length
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
    shared += norm_parameters(model) if parallel.sequence_parallel else 0
    if shared:
        yield Traffic("gradients of norm weights", "all-reduce", ranks, micro * width * shared)


def _data_parallel(memory: StageMemory) -> Iterator[Traffic]:
    layout, ranks = memory.layout, memory.layout.dp
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


@dataclass(frozen=True)
class CommGroup:
    """Process group of `size` ranks, `local` of which share a node."""

    cluster: Cluster
    size: int
    local: int

    @property
    def nodes(self) -> int:
        return self.size // self.local

    def one_way(self, size: float) -> float:
        """Return the seconds of an all-gather to, or reduce-scatter of, `size` bytes per rank.

        A rank receives all bytes but its own over NVLink. A node receives the bytes of other nodes
        once, over the network cards of its ranks in the group. Both overlap, so the slower link
        determines the time.
        """
        if self.size == 1:
            return 0.0
        card = self.cluster.card
        links = 1.0 if card.nvswitch else (self.local - 1) / max(1, self.cluster.gpus_per_node - 1)
        inner = size * (self.size - 1) / self.size
        outer = size * (self.nodes - 1) / self.nodes / (self.local * card.nic * NIC_SHARE)
        seconds = COLLECTIVE_SECONDS + self.cluster.latency * (self.nodes - 1)
        if self.local > 1:
            outer = max(outer, inner / (card.nvlink * NVLINK_SHARE * links))
        return seconds + outer

    def all_reduce(self, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes: reduce-scatter and all-gather."""
        return 2 * self.one_way(size)


def tensor_group(cluster: Cluster, tp: int) -> CommGroup:
    """Return the group of tensor-parallel ranks: neighbors, within one node where they fit."""
    return CommGroup(cluster, tp, min(tp, cluster.gpus_per_node))


def data_group(cluster: Cluster, dp: int, tp: int) -> CommGroup:
    """Return the group of data-parallel ranks: every tp-th rank."""
    return CommGroup(cluster, dp, min(dp, max(1, cluster.gpus_per_node // tp)))
