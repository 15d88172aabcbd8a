"""Time of the communication of a step: tensor, context, pipeline and data parallel."""

from megagrow.planning.cluster import Cluster
from megagrow.planning.step.groups import strided_group, tensor_group, transfer_seconds
from megagrow.planning.step.workload import WIDTH, Passes, StepWorkload


def tensor_parallel(work: StepWorkload, cluster: Cluster) -> Passes:
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
    return Passes(forward, forward + again).recomputed(work.recomputed)


def pipeline_end(work: StepWorkload, cluster: Cluster) -> float:
    """Return the seconds of the tensor-parallel collective after the embedding, in the forward
    pass, or of that before the head, in the backward pass."""
    size = WIDTH * work.micro_tokens * work.shape.model.hidden_size
    return tensor_group(cluster, work.tp).all_reduce(size)


def context_parallel(work: StepWorkload, cluster: Cluster) -> Passes:
    """Return the time of context-parallel collectives; each pass has the same ones."""
    group, seconds = strided_group(cluster, work.cp, work.tp), 0.0
    for layer_type, count in work.shape.blocks.items():
        each = layer_type.context_elements(work.shape.model, work.tp, work.cp_comm_type)
        if each.gathered:
            seconds += count * group.one_way(WIDTH * each.gathered * work.micro_tokens * work.cp)
        if each.exchanged:
            seconds += count * group.all_to_all(WIDTH * each.exchanged * work.micro_tokens)
    return Passes(seconds, seconds).recomputed(work.recomputed)


def pipeline_transfers(work: StepWorkload, cluster: Cluster) -> float:
    """Return the seconds per micro-batch of receiving hidden states and their gradients."""
    if work.split is None:
        return 0.0
    sliced = work.tp if work.sequence_parallel else 1
    size = WIDTH * work.micro_tokens * work.shape.model.hidden_size / sliced
    distance = work.partition * work.tp
    seconds = transfer_seconds(cluster, size, distance, work.split.ranks)
    return 2 * work.split.chunks_per_rank * seconds


def pipeline_bubble(work: StepWorkload, busy: list[float]) -> float:
    """Return the idle seconds of the slowest pipeline rank in a step.

    `busy` are the seconds of one micro-batch on each rank. With equal ranks the bubble is
    (pp - 1) / chunks per rank micro-batches (Narayanan et al. 2021, section 2.2). With fewer
    micro-batches than ranks, each rank also waits for them between its chunks.
    """
    if work.split is None:
        return 0.0
    chunks, missing = work.split.chunks_per_rank, max(0, work.split.ranks - work.accumulation)
    bubble = (sum(busy) - max(busy)) / chunks
    return bubble + missing * (1 - 1 / chunks) * sum(busy) / work.split.ranks


def zero_redundancy(work: StepWorkload, cluster: Cluster, micro: Passes) -> tuple[float, float]:
    """Return the seconds per step of data-parallel communication: exposed, and overlapped.

    ZeRO 3 gathers each layer's weights for both passes and reduce-scatters its gradients in every
    micro-batch. ZeRO 2 reduces in every micro-batch, ZeRO 1 once, in the last one, and both gather
    the weights after the step or during the next one. ZeRO 0 reduces once.
    """
    group = strided_group(cluster, work.partition, work.tp)
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
    group = strided_group(cluster, work.partition, work.tp)
    near = strided_group(cluster, work.hpz, work.tp) if work.hpz > 1 else group
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
