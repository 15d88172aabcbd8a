"""Cross-entropy over a vocabulary that is spread over ranks; the logits are never gathered."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.model import ops
from megagrow.parallel.topology import Topology

IGNORED = -100
"""The label of a position that has no next token (Hugging Face's convention)."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Losses (N,) from this rank's logits (N, V/tp); one exchange of three numbers per token."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        maximum, total, target = ops.vocab_statistics(logits, labels, first)
        if group.size() > 1:
            highest = maximum.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack((total * (maximum - highest).exp(), target))
            dist.all_reduce(sums, group=group)
            maximum, (total, target) = highest, sums
        ctx.save_for_backward(logits, labels, maximum, total)
        ctx.first = first
        return total.log() + (maximum - target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, maximum, total = ctx.saved_tensors
        # Not exp(logits - (maximum + log total)): that sum rounds the smaller part away.
        probabilities = (logits.float() - maximum[:, None]).exp_().div_(total[:, None])
        index = labels - ctx.first
        mine = (index >= 0) & (index < logits.shape[1])
        rows = torch.arange(labels.numel(), device=labels.device)
        probabilities[rows, index.clamp(0, logits.shape[1] - 1)] -= mine.float()
        return probabilities.mul_(grad[:, None]).to(logits.dtype), None, None, None


def cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int, topology: Topology) -> Tensor:
    """The sum over positions of -log softmax(logits)[label], in fp32, equal on all of a TP group.

    logits is (B, S, V/tp), this rank's rows of the padded vocabulary; padding takes no part.
    labels is (B, S) int64; positions labelled IGNORED add nothing.
    """
    first = topology.tp_rank * logits.shape[-1]
    real = min(max(vocab_size - first, 0), logits.shape[-1])
    logits = logits.flatten(0, 1)
    if real < logits.shape[1]:
        padding = torch.arange(logits.shape[1], device=logits.device) >= real
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    labels = labels.flatten()
    valid = labels != IGNORED
    safe = labels.masked_fill(~valid, 0)
    losses = _VocabParallelCrossEntropy.apply(logits, safe, first, topology.tp_group)
    return (losses * valid).sum()
