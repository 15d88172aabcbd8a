"""Time of a step by part: computation, memory traffic, exposed communication."""

from dataclasses import dataclass
from math import ceil

from megagrow.planning.cluster import Cluster
from megagrow.planning.step_rates import (
    ADAM_BYTES,
    ATTENTION_SHARE,
    BACKWARD_ATTENTION,
    BUSY_SHARE,
    DIAGONAL,
    EAGER_TRAFFIC,
    HBM_SHARE,
    HEAD_64,
    HIDDEN_COST,
    LOSS_BYTES,
    MATMUL_SHARE,
    TILE,
    TILE_START,
)
from megagrow.planning.step_workload import Stack, StepWorkload, block_products
from megagrow.planning.traffic import data_group, tensor_group

WIDTH = 2
"""Bytes of a bf16 element."""


@dataclass(frozen=True)
class Passes:
    """Seconds of all layers, forward and backward, recomputation included."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of one GPU; all parts but `zero_hidden` add up to `seconds`."""

    work: StepWorkload
    cluster: Cluster
    matmul: float
    attention: float
    memory_bound: float
    """Norms, rotary embeddings, activations, residuals, scans, the loss."""
    tensor_parallel: float
    """Blocking collectives between tensor-parallel ranks."""
    zero_exposed: float
    """Weight gathering and gradient reduction that do not overlap with computation."""
    hidden_cost: float
    """Slowdown of computation by overlapped communication."""
    optimizer: float
    zero_hidden: float
    """Overlapped weight gathering and gradient reduction; not part of the sum."""

    @property
    def seconds(self) -> float:
        computed = self.matmul + self.attention + self.memory_bound + self.optimizer
        return computed + self.tensor_parallel + self.zero_exposed + self.hidden_cost

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second of one GPU."""
        return self.work.step_tokens / self.work.gpus / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: FLOPs of `model.layers.flops` over the dense bf16 peak."""
        return self.tokens_per_gpu * self.work.shape.flops_per_token / self.cluster.gpu.peak_flops


def step_time(work: StepWorkload, cluster: Cluster) -> StepTime:
    """Return the time of a step of `work` on as many GPUs of the cluster as it has ranks."""
    matmul, attention = _matmul(work, cluster), _attention(work, cluster)
    memory = _memory_bound(work, cluster)
    head, loss = _head(work, cluster)
    tensor = _tensor_parallel(work, cluster)
    micro = Passes(
        matmul.forward + attention.forward + memory.forward + tensor.forward + head / 3,
        matmul.backward + attention.backward + memory.backward + tensor.backward + 2 * head / 3,
    )
    exposed, hidden = _zero(work, cluster, micro)
    times = work.accumulation
    return StepTime(
        work=work,
        cluster=cluster,
        matmul=times * (matmul.both + head),
        attention=times * attention.both,
        memory_bound=times * (memory.both + loss),
        tensor_parallel=times * tensor.both,
        zero_exposed=exposed,
        hidden_cost=HIDDEN_COST * hidden,
        optimizer=_optimizer(work, cluster),
        zero_hidden=hidden,
    )


def matmul_seconds(cluster: Cluster, stack: Stack, rows: int, columns: int, inner: int) -> float:
    """Return the seconds of one bf16 product (rows x inner) (inner x columns).

    The result is split into tiles, one per multiprocessor at a time, computed in waves; the last
    wave is partially filled.
    """
    card = cluster.card
    share = MATMUL_SHARE[card.family] * BUSY_SHARE[card.family, stack] * cluster.power_share
    tiles = ceil(rows / TILE[0]) * ceil(columns / TILE[1])
    waves = ceil(tiles / card.processors)
    wave_flops = 2 * TILE[0] * TILE[1] * (inner + TILE_START) * card.processors
    return waves * wave_flops / (cluster.gpu.peak_flops * share)


def _matmul(work: StepWorkload, cluster: Cluster) -> Passes:
    """Return the time of all products of all layers: forward, input and weight gradients."""
    tokens, forward, backward = work.micro_tokens, 0.0, 0.0
    for layer_type, count in work.shape.blocks.items():
        for columns, inner in block_products(layer_type, work.shape.model, work.tp):
            forward += count * matmul_seconds(cluster, work.stack, tokens, columns, inner)
            backward += count * matmul_seconds(cluster, work.stack, tokens, inner, columns)
            backward += count * matmul_seconds(cluster, work.stack, columns, inner, tokens)
    return _with_recomputation(work, forward, backward)


def _attention(work: StepWorkload, cluster: Cluster) -> Passes:
    """Return the time of matrix products between activations."""
    model, family = work.shape.model, cluster.card.family
    share = ATTENTION_SHARE[work.attention, family] * (HEAD_64 if model.head_dim <= 64 else 1)
    share *= cluster.power_share
    flops = sum(
        count * layer_type.score_products(model, work.shape.sequence, DIAGONAL)
        for layer_type, count in work.shape.blocks.items()
    )
    forward = work.micro_tokens * flops / 3 / work.tp / (cluster.gpu.peak_flops * share)
    return _with_recomputation(work, forward, BACKWARD_ATTENTION * forward)


def _memory_bound(work: StepWorkload, cluster: Cluster) -> Passes:
    """Return the time of norms with residuals and of memory-bound operations of all blocks.

    Recomputation repeats the norms without residuals, which move half the bytes.
    """
    model, blocks = work.shape.model, work.shape.blocks
    split_norms = work.tp if work.sequence_parallel else 1
    residual = blocks.total() * 8 * model.hidden_size / split_norms
    rows = [(count, each.row_elements(model)) for each, count in blocks.items()]
    split = WIDTH / work.tp
    forward = residual + split * sum(count * each.forward for count, each in rows)
    backward = residual + split * sum(count * each.backward for count, each in rows)
    if work.recomputes_rows:
        backward += residual / 2 + split * sum(count * each.recomputed for count, each in rows)
    seconds = (
        work.micro_tokens * (EAGER_TRAFFIC if work.stack == "eager" else 1) / _bandwidth(cluster)
    )
    return _with_recomputation(work, forward * seconds, backward * seconds)


def _head(work: StepWorkload, cluster: Cluster) -> tuple[float, float]:
    """Return the time of the head's three products and of the loss."""
    columns, tokens = work.shape.model.vocab_size // work.tp, work.micro_tokens
    sizes = (
        (tokens, columns, work.shape.model.hidden_size),
        (tokens, work.shape.model.hidden_size, columns),
        (columns, work.shape.model.hidden_size, tokens),
    )
    moved = LOSS_BYTES[work.stack] * tokens * columns
    return sum(matmul_seconds(cluster, work.stack, *size) for size in sizes), moved / _bandwidth(
        cluster
    )


def _tensor_parallel(work: StepWorkload, cluster: Cluster) -> Passes:
    """Return the time of tensor-parallel collectives.

    There is one all-reduce per block in each pass, in addition to sums within blocks. With sequence
    parallelism it is an all-gather and a reduce-scatter, and each weight gradient whose input is
    sharded needs one more all-gather.
    """
    group, model = tensor_group(cluster, work.tp), work.shape.model
    size, blocks = WIDTH * work.micro_tokens * model.hidden_size, work.shape.blocks
    within = (
        count * group.all_reduce(summed * work.micro_tokens)
        for layer_type, count in blocks.items()
        if (summed := layer_type.partial_sums(model, WIDTH))
    )
    forward = blocks.total() * group.all_reduce(size) + sum(within)
    again = blocks.total() * group.one_way(size) if work.sequence_parallel else 0.0
    passes = _with_recomputation(work, forward, forward + again)
    ends = group.all_reduce(size)  # the embedding forward, the head's input backward
    return Passes(passes.forward + ends, passes.backward + ends)


def _with_recomputation(work: StepWorkload, forward: float, backward: float) -> Passes:
    return Passes(forward, backward + work.recomputed * forward)


def _zero(work: StepWorkload, cluster: Cluster, micro: Passes) -> tuple[float, float]:
    """Return the seconds per step of data-parallel communication: exposed, and overlapped.

    ZeRO 3 gathers each layer's weights for both passes and reduce-scatters its gradients in every
    micro-batch. ZeRO 2 reduces in every micro-batch, ZeRO 1 once, in the last one, and both gather
    the weights after the step or during the next one. ZeRO 0 reduces once.
    """
    group = data_group(cluster, work.dp, work.tp)
    parameters, times = work.rank_parameters, work.accumulation
    if work.zero_stage == 3:
        return _zero3(work, cluster, micro)
    gather = group.one_way(WIDTH * parameters) if work.zero_stage else 0.0
    pieces = work.gradient_buckets if work.zero_stage else 1
    reduce = pieces * group.one_way(work.gradient_bytes * parameters / pieces)
    reduce *= 1 if work.zero_stage else 2
    reduced = times if work.zero_stage == 2 else 1
    gathered = min(gather, micro.forward) if work.overlap_param_gather else 0.0
    hidden = gathered
    if work.overlap_grad_reduce:
        hidden += reduced * min(reduce, micro.backward)
    return gather + reduced * reduce - hidden, hidden


def _zero3(work: StepWorkload, cluster: Cluster, micro: Passes) -> tuple[float, float]:
    """Return the exposed and the overlapped seconds of ZeRO 3; one collective per layer.

    With hpZ only the first forward pass gathers from all data-parallel ranks.
    """
    group = data_group(cluster, work.dp, work.tp)
    near = data_group(cluster, work.hpz, work.tp) if work.hpz > 1 else group
    parameters, times = work.rank_parameters, work.accumulation
    pieces = work.shape.model.num_hidden_layers + 2
    first = pieces * group.one_way(WIDTH * parameters / pieces)
    again = pieces * near.one_way(WIDTH * parameters / pieces)
    reduce = pieces * group.one_way(work.gradient_bytes * parameters / pieces)
    exposed = times * max(reduce / pieces, again + reduce - micro.backward)
    for gather, passes in ((first, 1), (again, times - 1)):
        exposed += passes * max(gather / pieces, gather - micro.forward)
    total = first + (2 * times - 1) * again + times * reduce
    return exposed, total - exposed


def _optimizer(work: StepWorkload, cluster: Cluster) -> float:
    held = work.rank_parameters / (work.dp if work.zero_stage else 1)
    return held * ADAM_BYTES[work.stack] / _bandwidth(cluster)


def _bandwidth(cluster: Cluster) -> float:
    return cluster.card.hbm * HBM_SHARE
