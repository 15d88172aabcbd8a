"""The head and its cross-entropy in chunks of tokens: the logits of all tokens never exist.

A chunk's logits are made, measured, turned into their gradient, and used up for the gradients of
the hidden states and of the weight, all on the way forward; the way back multiplies these two by
the gradient of the loss. So it costs the same three products as a plain head, and instead of the
logits there is a chunk of them.

Shapes: N tokens, D hidden size, V rows of the padded vocabulary that this rank holds.
"""

from typing import Any

import torch
from torch import Tensor

from megagrow.model.ops import TORCH_LOSS, LossOps
from megagrow.parallel.loss import VocabLoss, vocab_loss
from megagrow.parallel.process_groups import Topology

TILE = 128
"""Chunks are multiples of it where they can be: matrix products are cut into such tiles."""


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss of hidden states (N, D) under weight (V, D) and labels (N,).

    The weight's gradient is summed up in the weight's own type. Where that is bf16 it is rounded
    once per chunk, of which there are about ten (each a product over all tokens of the chunk, fp32
    inside), as happens to gradients that are accumulated over micro batches; a sum in fp32 would
    take 4 V D bytes, which is more than the logits of 2 D tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss: VocabLoss, learns: bool
    ) -> Tensor:
        dtype = _computed_in(hidden)
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        gradients = (torch.empty_like(hidden), torch.zeros_like(weight)) if learns else None
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        size = chunk_size(len(labels), loss.ops.chunks)
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            losses[part] = _chunk(rows[part], matrix, labels[part], loss, part, gradients)
        ctx.gradients = gradients
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_hidden, of_weight = ctx.gradients
        del ctx.gradients  # autograd copies what somebody else still holds
        return of_hidden.mul_(grad), of_weight.mul_(grad), None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    topology: Topology,
    ops: LossOps = TORCH_LOSS,
    z_loss: float = 0.0,
) -> Tensor:
    """`cross_entropy` of hidden @ weight.T, in fp32, equal on all of a TP group.

    hidden is (B, S, D), the same on all ranks of the group; weight is (V/tp, D), this rank's rows
    of the padded vocabulary; labels is (B, S) int64. Of the gradient of hidden this rank finds its
    rows' part, to be summed over the group (as the model's `enter` does). Under autocast the
    products are in its type. Call it while the weight is whole (ZeRO-3 gathers it for the head
    only); the way back can be taken once.
    """
    loss = vocab_loss(len(weight), vocab_size, topology, ops, z_loss)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), loss, learns)


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: VocabLoss,
    part: slice,
    gradients: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The losses (n,) of a chunk; its part is written to the gradients of hidden, and added to
    those of weight."""
    logits = hidden @ weight.t()
    statistics = loss.statistics(logits, labels)
    if gradients is not None:
        of_hidden, of_weight = gradients
        of_losses = torch.ones(len(labels), dtype=torch.float32, device=labels.device)
        logits = loss.gradient(logits, labels, statistics, of_losses)
        of_hidden[part] = logits @ weight
        if of_weight.dtype == logits.dtype:
            of_weight.addmm_(logits.t(), hidden)
        else:  # under autocast
            of_weight += logits.t() @ hidden
    return loss.losses(statistics, labels)


def chunk_size(tokens: int, chunks: int) -> int:
    """Tokens of a chunk, at most tokens / chunks where that is possible."""
    most = max(1, tokens // chunks)
    return most - most % TILE if most >= TILE else most


def _computed_in(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
