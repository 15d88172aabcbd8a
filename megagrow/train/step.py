"""One training step, and the loss of a batch without an update."""

import resource
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megagrow.common.progress import PhaseProgress
from megagrow.data.batches import Batch, BatchReader
from megagrow.model.masks import Masks
from megagrow.model.ops import Ops
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.context.shards import shard_of
from megagrow.parallel.engine_config import NO_RATES
from megagrow.parallel.loss import IGNORED, cross_entropy, linear_cross_entropy
from megagrow.parallel.pipeline.execution import AtSlot, PipelineRun
from megagrow.parallel.pipeline.passes import pipeline_run
from megagrow.parallel.pipeline.schedule import Pass
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.update_scaling import StepLimits
from megagrow.train.stage import Stage


def train_step(
    stage: Stage,
    batches: Sequence[Batch],
    lr: float,
    masks: Masks | None,
    other_rates: Mapping[str, float] = NO_RATES,
    limits: StepLimits | None = None,
    at_slot: AtSlot = lambda slot, slots: None,
) -> torch.Tensor:
    """Run forward and backward over this rank's micro-batches, and one optimizer step. Collective.

    Args:
        stage: the stage.
        batches: this rank's micro-batches.
        lr: learning rate.
        masks: this rank's growth masks while they are ramping, else None.
        other_rates: learning rates of `schedule.other_rates_at`.
        limits: a step whose cross-entropy or gradient norm is above them updates nothing.
        at_slot: called at each slot of the schedule, as in `PipelineRun.execute`.

    Returns:
        (4,) fp64 on the device, to which the host has not synchronized: the cross-entropy (mean
        over the global batch's tokens, in nats), the gradient norm before clipping, the z-loss,
        which `optimizer.z_loss_multiplier` adds to the trained loss, and 1 for a step above the
        limits, else 0. If the loss or a gradient is not finite on any rank, the norm is not finite
        on all ranks and nothing is updated. A position without a next token (the last of a corpus)
        counts as a loss of zero, so that every layout divides by the same number. With
        `answers_only` the mean is over the unmasked labels of the global batch; without any, loss
        and gradient are 0.
    """
    topology, engine = stage.topology, stage.engine
    totals = torch.zeros(2, device=topology.device)
    z_loss = stage.config.optimizer.z_loss_multiplier
    positions = _counted(stage, batches) if stage.answers_only else None

    def forward(each: Pass, hidden: torch.Tensor | None) -> torch.Tensor:
        batch = batches[each.micro_batch]
        output = _chunk_output(stage, each.chunk, batch, hidden, masks, z_loss)
        if each.chunk != engine.split.last_chunk:
            return output
        losses = output / (batch.labels.numel() if positions is None else positions)
        totals.add_(losses.detach() / len(batches))
        loss = losses[0]
        # A loss that is not finite makes the factor NaN, and with it the gradient norm.
        return loss * (1 + 0 * loss.detach())

    def backward(each: Pass, loss: torch.Tensor) -> None:
        engine.backward(loss, last=each.micro_batch + 1 == len(batches))

    engine.begin_step(len(batches))
    _pipeline(stage, batches, trains=True).execute(forward, backward, at_slot)
    for each in totals if z_loss else totals[:1]:
        _sum_over_replicas(each, topology)
    total, z_total = totals.double() / topology.dp
    engine.gate.set(total - z_total, limits)
    norm = engine.step(lr, other_rates)
    exceeded = engine.gate.exceeded
    exceeded = torch.zeros_like(total) if exceeded is None else exceeded.to(total)
    return torch.stack((total - z_total, norm.to(total), z_total, exceeded))


def mean_loss(stage: Stage, reader: BatchReader, sequences: int, masks: Masks | None) -> float:
    """Return the mean loss per token over the first sequences of a stream, in nats. Collective.

    IGNORED labels do not count; without any label the loss is 0. Sequences are distributed over the
    data-parallel ranks; the result does not depend on their number.
    """
    micro, ranks = stage.config.batch.micro_batch_size, stage.topology.batch_ranks
    shard = shard_of(stage.topology)
    sums = torch.zeros(2, dtype=torch.float64, device=stage.topology.device)

    def read(index: int) -> Batch:
        first = (index * ranks + stage.topology.batch_rank) * micro
        indices = list(range(first, first + micro))
        # Only the rank that reads a damaged corpus detects it, and all ranks must stop.
        within = [min(index, sequences - 1) for index in indices]
        batch = run_on_all_ranks(partial(reader.read, 0, within))
        batch.labels[torch.tensor([index >= sequences for index in indices])] = IGNORED
        return batch.sharded(shard.of)

    with stage.evaluating(sharded=True):
        # Every rank makes the same number of passes, because ZeRO-3 gathers weights in each of
        # them. Indices beyond the end repeat the last sequence and are not counted.
        passes = -(-sequences // (micro * ranks))
        progress = PhaseProgress("validation", passes, "passes")
        for first in range(0, passes, _passes_at_once(stage)):
            group = range(first, min(first + _passes_at_once(stage), passes))
            sums += _summed_losses(stage, [read(index) for index in group], masks)
            progress.advance(len(group))
    _sum_over_replicas(sums, stage.topology)
    return (sums[0] / sums[1].clamp(min=1)).item()


def _passes_at_once(stage: Stage) -> int:
    """Return the micro-batches that are validated together; a pipeline idles less with several."""
    return 1 if stage.topology.pp == 1 else 4 * stage.topology.pp


def _summed_losses(stage: Stage, batches: Sequence[Batch], masks: Masks | None) -> torch.Tensor:
    """Return the sum of the losses of micro-batches, and the number of labels: (2,) fp64.

    On a pipeline rank without the head both are 0.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=stage.topology.device)

    def forward(each: Pass, hidden: torch.Tensor | None) -> torch.Tensor:
        batch = batches[each.micro_batch]
        output = _chunk_output(stage, each.chunk, batch, hidden, masks)
        if each.chunk == stage.engine.split.last_chunk:
            sums[0] += output[0]
            sums[1] += (batch.labels != IGNORED).sum()
        return output

    _pipeline(stage, batches, trains=False).execute(forward)
    return sums


def _pipeline(stage: Stage, batches: Sequence[Batch], trains: bool) -> PipelineRun:
    """Return the passes of all chunks for some micro-batches."""
    return pipeline_run(stage.engine, batches[0].input_ids, len(batches), trains)


def _sum_over_replicas(values: torch.Tensor, topology: Topology) -> None:
    """Sum values over the data- and context-parallel ranks, and over the pipeline ranks, of which
    only the last one has values other than 0. Collective."""
    dist.all_reduce(values, group=topology.dp_group)
    if topology.pp_group is not None:
        dist.all_reduce(values, group=topology.pp_group)


def model_inputs(
    batch: Batch, ops: Ops, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the model's inputs on its device: token ids, positions and packed documents.

    Documents are packed on the CPU. Pinned inputs are copied without waiting for the device.
    """
    documents = batch.packed(ops.pack).documents
    return (
        batch.input_ids.to(device, non_blocking=True),
        batch.position_ids.to(device, non_blocking=True),
        None if documents is None else documents.to(device, non_blocking=True),
    )


def _counted(stage: Stage, batches: Sequence[Batch]) -> torch.Tensor:
    """Return the unmasked labels of the global batch, per micro-batch of all ranks. Collective.

    Their number differs between micro-batches. The engine averages over micro-batches and ranks;
    sums divided by this number average to the mean over all unmasked labels.
    """
    count = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    total = torch.full((), count, dtype=torch.float64, device=stage.topology.device)
    dist.all_reduce(total, group=stage.topology.dp_group)
    return (total.clamp(min=1) / (len(batches) * stage.topology.dp)).float()


def _chunk_output(
    stage: Stage,
    chunk: int,
    batch: Batch,
    hidden: torch.Tensor | None,
    masks: Masks | None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Return the hidden states after a chunk, or `cross_entropy` of a micro-batch after the last.

    `hidden` are the hidden states before the chunk, None for the first one.
    """
    device, ops, engine = stage.topology.device, stage.ops, stage.engine
    ids, positions, documents = model_inputs(batch, ops, device)
    inputs = (ids if hidden is None else hidden, positions, documents, masks)
    if chunk != engine.split.last_chunk:
        return engine.forward(*inputs, None, None, engine.chunks[chunk])
    labels, vocab = batch.labels.to(device, non_blocking=True), stage.config.model.vocab_size
    head = None
    if stage.config.kernels.linear_cross_entropy:
        head = partial(
            linear_cross_entropy,
            labels=labels,
            vocab_size=vocab,
            topology=stage.topology,
            ops=ops.loss,
            z_loss=z_loss,
        )
    output = engine.forward(*inputs, head, None, engine.chunks[chunk])
    if head is not None:
        return output
    return cross_entropy(output, labels, vocab, stage.topology, ops.loss, z_loss)


def peak_memory(device: torch.device) -> int:
    """Return the highest memory use of this rank since the process started, in bytes.

    On a GPU the memory of the allocator, on a CPU that of the process.
    """
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
