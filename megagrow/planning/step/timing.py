"""Time of a step by part: computation, memory traffic, exposed communication."""

from dataclasses import dataclass
from math import ceil

from megagrow.planning.cluster import Cluster
from megagrow.planning.step.communication import (
    context_parallel,
    pipeline_bubble,
    pipeline_end,
    pipeline_transfers,
    tensor_parallel,
    zero_redundancy,
)
from megagrow.planning.step.rates import (
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
from megagrow.planning.step.workload import WIDTH, Passes, Stack, StepWorkload, block_products


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
    context_parallel: float
    """Blocking collectives between context-parallel ranks."""
    pipeline_transfers: float
    """Hidden states and gradients that a rank waits for between two passes."""
    pipeline_bubble: float
    """Time in which a pipeline rank waits for the first and last micro-batches of other ranks."""
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
        model_parallel = self.tensor_parallel + self.context_parallel + self.pipeline_transfers
        return (
            computed + model_parallel + self.pipeline_bubble + self.zero_exposed + self.hidden_cost
        )

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second of one GPU."""
        return self.work.step_tokens / self.work.gpus / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: FLOPs of `model.layers.flops` over the dense bf16 peak."""
        return self.tokens_per_gpu * self.work.shape.flops_per_token / self.cluster.gpu.peak_flops


def step_time(work: StepWorkload, cluster: Cluster) -> StepTime:
    """Return the time of a step of `work` on as many GPUs of the cluster as it has ranks.

    Of a pipeline it is the time of the slowest rank, and the bubble.
    """
    matmul, attention = _matmul(work, cluster), _attention(work, cluster)
    memory = _memory_bound(work, cluster)
    head, loss = _head(work, cluster)
    tensor, context = tensor_parallel(work, cluster), context_parallel(work, cluster)
    end = pipeline_end(work, cluster)
    parts = (matmul, attention, memory, tensor, context)
    layers = Passes(sum(each.forward for each in parts), sum(each.backward for each in parts))
    sent = pipeline_transfers(work, cluster)
    extra = [0.0] * work.pp
    extra[0] += end
    extra[-1] += end + head + loss
    busy = [
        share * layers.both + more for share, more in zip(work.layer_shares, extra, strict=True)
    ]
    slowest = max(range(work.pp), key=busy.__getitem__)
    share, on_last = work.layer_shares[slowest], slowest == work.pp - 1
    micro = Passes(
        share * layers.forward + (slowest == 0) * end + on_last * head / 3,
        share * layers.backward + on_last * (end + 2 * head / 3),
    )
    exposed, hidden = zero_redundancy(work, cluster, micro)
    times = work.accumulation
    return StepTime(
        work=work,
        cluster=cluster,
        matmul=times * (share * matmul.both + on_last * head),
        attention=times * share * attention.both,
        memory_bound=times * (share * memory.both + on_last * loss),
        tensor_parallel=times * (share * tensor.both + end * ((slowest == 0) + on_last)),
        context_parallel=times * share * context.both,
        pipeline_transfers=times * sent,
        pipeline_bubble=pipeline_bubble(work, [each + sent for each in busy]),
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
    return Passes(forward, backward).recomputed(work.recomputed)


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
    return Passes(forward, BACKWARD_ATTENTION * forward).recomputed(work.recomputed)


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
    return Passes(forward * seconds, backward * seconds).recomputed(work.recomputed)


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


def _optimizer(work: StepWorkload, cluster: Cluster) -> float:
    held = work.rank_parameters / (work.partition if work.zero_stage else 1)
    return held * ADAM_BYTES[work.stack] / _bandwidth(cluster)


def _bandwidth(cluster: Cluster) -> float:
    return cluster.card.hbm * HBM_SHARE
