"""Cross-entropy over a vocabulary that is spread over ranks; the logits are never gathered.

Shapes: N tokens, V rows of the padded vocabulary that this rank holds.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.model.ops import TORCH_LOSS, LossOps
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import real_rows

IGNORED = -100
"""The label of a position that has no next token (Hugging Face's convention)."""


@dataclass(frozen=True)
class VocabLoss:
    """The loss of single tokens and its gradient, as a rank computes them from its rows of the
    vocabulary: -log softmax(logits)[label] + z_loss * logsumexp(logits)^2."""

    first: int
    real: int
    """Of the rows from `first` on, so many are no padding."""
    group: dist.ProcessGroup
    ops: LossOps
    z_loss: float

    def statistics(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(3, N) fp32 of the whole vocabulary: maximum, sum of exp(logit - maximum), logit of the
        label. Collective over the tensor-parallel group.

        Reduced as they are, the maxima would have to be known before the sums can be added: two
        all-reduces, the second waiting for the first. Three numbers per token and rank are so
        few that gathering them costs no more than one, and then every rank combines the same
        numbers in the same order: all of them get the same bits, and get them again.
        """
        triple = self.ops.statistics(logits, labels, self.first, self.real)
        if self.group.size() == 1:
            return triple
        triples = triple.new_empty((self.group.size(), *triple.shape))
        dist.all_gather_into_tensor(triples, triple[None].contiguous(), group=self.group)
        return self.ops.combine(triples)

    def losses(self, statistics: Tensor, labels: Tensor) -> Tensor:
        """(N,) fp32; 0 where the label is IGNORED."""
        maximum, total, target = statistics
        log_total = total.log()
        losses = log_total + (maximum - target)
        if self.z_loss != 0:
            losses += self.z_loss * (maximum + log_total).square()
        return losses * (labels != IGNORED)

    def gradient(self, logits: Tensor, labels: Tensor, statistics: Tensor, grad: Tensor) -> Tensor:
        """(N, V), where `grad` (N,) is that of the losses; may take the memory of the logits."""
        maximum, total, _ = statistics
        scale = grad * (labels != IGNORED)
        return self.ops.gradient(
            logits, labels, maximum, total, scale, self.z_loss * scale, self.first, self.real
        )


def vocab_loss(
    width: int, vocab_size: int, topology: Topology, ops: LossOps, z_loss: float
) -> VocabLoss:
    """Of this rank, which holds `width` rows of the padded vocabulary."""
    real = real_rows(vocab_size, width, topology.tp_rank)
    return VocabLoss(topology.tp_rank * width, real, topology.tp_group, ops, z_loss)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, loss: VocabLoss) -> Tensor:
        statistics = loss.statistics(logits, labels)
        ctx.save_for_backward(logits, labels, statistics)
        ctx.loss = loss
        return loss.losses(statistics, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, statistics = ctx.saved_tensors
        return ctx.loss.gradient(logits, labels, statistics, grad), None, None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    topology: Topology,
    ops: LossOps = TORCH_LOSS,
    z_loss: float = 0.0,
) -> Tensor:
    """The sum over positions of -log softmax(logits)[label], in fp32, equal on all of a TP group.

    logits is (B, S, V/tp), this rank's rows of the padded vocabulary; padding takes no part.
    labels is (B, S) int64; positions labelled IGNORED add nothing. z_loss is the coefficient of
    the squared log of the softmax's denominator, which is added for each position (Chowdhery et
    al. 2022, section 5). With ops that work in place the way back overwrites the logits.
    """
    loss = vocab_loss(logits.shape[-1], vocab_size, topology, ops, z_loss)
    return _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), loss).sum()


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
