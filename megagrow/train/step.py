"""One training step, and the loss of a batch without one."""

import resource
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megagrow.data.batches import Batch, BatchReader
from megagrow.model.masks import Masks
from megagrow.model.ops import Ops
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.loss import IGNORED, cross_entropy, linear_cross_entropy
from megagrow.train.stage import Stage


def train_step(
    stage: Stage, batches: Sequence[Batch], lr: float, masks: Masks | None
) -> tuple[float, float]:
    """Forward and backward over this rank's micro batches, and one update of the weights.

    `masks` are this rank's, where parts of the model are still being let in.

    Returns the loss (mean over the global batch's tokens, in nats) and the gradient norm before
    clipping. If the loss or a gradient is not finite on any rank then the norm is not, on all of
    them, and nothing was updated. A position without a next token (the last of a corpus) counts as
    a loss of zero, so that every layout divides by the same number. Where only answers count the
    mean is over the labels of the global batch that do: if none does, loss and gradient are 0.
    """
    total = torch.zeros((), device=stage.topology.device)
    norm = None
    positions = _counted(stage, batches) if stage.answers_only else None
    for batch in batches:
        loss = _summed_loss(stage, batch, masks) / (positions or batch.labels.numel())
        # 1 where the loss is finite, else NaN: then so is the gradient, and the norm tells all.
        stage.engine.backward(loss * (1 + 0 * loss.detach()))
        norm = stage.engine.step(lr)
        total += loss.detach() / len(batches)
    dist.all_reduce(total, group=stage.topology.dp_group)
    if norm is None:
        raise AssertionError("the engine did not update the weights at the last micro batch")
    return total.item() / stage.topology.dp, norm


def mean_loss(stage: Stage, reader: BatchReader, sequences: int, masks: Masks | None) -> float:
    """Mean loss per token over the first sequences of a stream, in nats; all ranks together.

    Labels that are IGNORED do not count (if none does the loss is 0). Sequences are dealt out to
    the data-parallel ranks; the result does not depend on how many there are.
    """
    micro, dp = stage.config.batch.micro_batch_size, stage.topology.dp
    sums = torch.zeros(2, dtype=torch.float64, device=stage.topology.device)
    stage.engine.train(False)
    with torch.no_grad():
        # Every rank makes the same number of passes (ZeRO-3 gathers weights in each of them):
        # what lies beyond the end is read as the last sequence again, and not counted.
        for index in range(-(-sequences // (micro * dp))):
            first = (index * dp + stage.topology.dp_rank) * micro
            indices = list(range(first, first + micro))
            # A damaged corpus is seen by the rank that reads it, and has to stop all of them.
            within = [min(index, sequences - 1) for index in indices]
            batch = run_on_all_ranks(partial(reader.read, 0, within))
            beyond = torch.tensor([index >= sequences for index in indices])
            batch.labels[beyond] = IGNORED
            sums[0] += _summed_loss(stage, batch, masks)
            sums[1] += (batch.labels != IGNORED).sum()
    stage.engine.train()
    dist.all_reduce(sums, group=stage.topology.dp_group)
    return (sums[0] / sums[1].clamp(min=1)).item()


def model_inputs(
    batch: Batch, ops: Ops, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """What the model takes of a batch, on its device: token ids, positions, and documents, which
    are packed before they leave the CPU."""
    documents = None if batch.document_ids is None else ops.pack(batch.document_ids).to(device)
    return batch.input_ids.to(device), batch.position_ids.to(device), documents


def _counted(stage: Stage, batches: Sequence[Batch]) -> float:
    """Labels of the global batch that count, per micro batch of all ranks; collective.

    How many there are differs from one micro batch to the next. The engine takes the mean over
    micro batches and ranks: with sums divided by this it is the mean over all counted labels.
    """
    count = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    total = torch.tensor(count, device=stage.topology.device)
    dist.all_reduce(total, group=stage.topology.dp_group)
    return max(total.item(), 1) / (len(batches) * stage.topology.dp)


def _summed_loss(stage: Stage, batch: Batch, masks: Masks | None) -> torch.Tensor:
    device, ops = stage.topology.device, stage.ops
    inputs = (*model_inputs(batch, ops, device), masks)
    labels, vocab = batch.labels.to(device), stage.config.model.vocab_size
    if stage.config.kernels.linear_cross_entropy:
        head = partial(
            linear_cross_entropy,
            labels=labels,
            vocab_size=vocab,
            topology=stage.topology,
            ops=ops.loss,
        )
        return stage.engine.forward(*inputs, head)
    return cross_entropy(stage.engine.forward(*inputs), labels, vocab, stage.topology, ops.loss)


def peak_memory(device: torch.device) -> int:
    """Bytes; the highest use since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
