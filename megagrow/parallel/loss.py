"""Vocabulary-parallel cross-entropy; the logits are never gathered.

`cross_entropy` takes logits; `linear_cross_entropy` fuses the head and never holds all logits.
Shapes: N tokens, V rows of the padded vocabulary on this rank.
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
"""Label of positions excluded from the loss (Hugging Face's convention)."""


@dataclass(frozen=True)
class VocabLoss:
    """Per-token loss and its gradient, computed from a rank's rows of the vocabulary.

    The loss is -log softmax(logits)[label] + z_loss * logsumexp(logits)^2.
    """

    first: int
    real: int
    """Rows, starting at `first`, that are not padding."""
    group: dist.ProcessGroup
    ops: LossOps
    z_loss: float

    def statistics(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the softmax statistics over the full vocabulary: (3, N) fp32. Collective.

        The rows are the maximum, the sum of exp(logit - maximum) and the logit of the label. The
        collective runs over the tensor-parallel group. All-reduces would need two dependent rounds,
        maxima before sums. Gathering three numbers per token and rank costs no more than one of
        them. Every rank combines the same numbers in the same order, so the result is reproducible
        and bit-identical on all ranks.
        """
        triple = self.ops.statistics(logits, labels, self.first, self.real)
        if self.group.size() == 1:
            return triple
        triples = triple.new_empty((self.group.size(), *triple.shape))
        dist.all_gather_into_tensor(triples, triple[None].contiguous(), group=self.group)
        return self.ops.combine(triples)

    def losses(self, statistics: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses (N,) fp32 and their part that is the z-loss; 0 for label IGNORED."""
        maximum, total, target = statistics
        log_total, counts = total.log(), labels != IGNORED
        losses, z_losses = log_total + (maximum - target), torch.zeros_like(total)
        if self.z_loss != 0:
            z_losses = self.z_loss * (maximum + log_total).square() * counts
            losses += z_losses
        return losses * counts, z_losses

    def gradient(self, logits: Tensor, labels: Tensor, statistics: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient (N, V) for loss gradients `grad` (N,); may reuse the logits."""
        maximum, total, _ = statistics
        scale = grad * (labels != IGNORED)
        return self.ops.gradient(
            logits, labels, maximum, total, scale, self.z_loss * scale, self.first, self.real
        )


def vocab_loss(
    width: int, vocab_size: int, topology: Topology, ops: LossOps, z_loss: float
) -> VocabLoss:
    """Return the loss of this rank, which holds `width` rows of the padded vocabulary."""
    real = real_rows(vocab_size, width, topology.tp_rank)
    return VocabLoss(topology.tp_rank * width, real, topology.tp_group, ops, z_loss)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, loss: VocabLoss) -> tuple[Tensor, Tensor]:
        statistics = loss.statistics(logits, labels)
        ctx.save_for_backward(logits, labels, statistics)
        ctx.loss = loss
        losses, z_losses = loss.losses(statistics, labels)
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
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
    """Return the loss and its part that is the z-loss: (2,) fp32 sums, equal on a TP group.

    The loss is the sum over positions of -log softmax(logits)[label], plus z_loss times the squared
    log of the softmax denominator (Chowdhery et al. 2022, section 5). The second entry is for
    reports and has no gradient. logits is (B, S, V/tp), this rank's rows of the padded vocabulary;
    padding is excluded. labels is (B, S) int64; positions labeled IGNORED contribute 0.
    With in-place ops, backward overwrites the logits.
    """
    loss = vocab_loss(logits.shape[-1], vocab_size, topology, ops, z_loss)
    losses = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), loss)
    return torch.stack([each.sum() for each in losses])


TILE = 128
"""Chunk sizes are multiples of this where possible, the tile size of matrix products."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed loss of hidden states (N, D) under weight (V, D) and labels (N,).

    The weight gradient is accumulated in the weight's dtype. In bf16 it is rounded once per chunk,
    about ten times (each chunk's product accumulates in fp32), like gradients accumulated over
    micro-batches; an fp32 sum would take 4 V D bytes, more than the logits of 2 D tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss: VocabLoss, learns: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden)
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        gradients = (torch.empty_like(hidden), torch.zeros_like(weight)) if learns else None
        losses, z_losses = torch.empty(2, len(labels), dtype=torch.float32, device=hidden.device)
        size = chunk_size(len(labels), loss.ops.chunks)
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            losses[part], z_losses[part] = _chunk(
                rows[part], matrix, labels[part], loss, part, gradients
            )
        ctx.gradients, z_sum = gradients, z_losses.sum()
        ctx.mark_non_differentiable(z_sum)
        return losses.sum(), z_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_hidden, of_weight = ctx.gradients
        del ctx.gradients  # autograd copies gradients that are referenced elsewhere
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
    """Return `cross_entropy` of hidden @ weight.T: (2,) fp32, equal on all ranks of a TP group.

    hidden is (B, S, D), equal on all ranks of the group; weight is (V/tp, D), this rank's rows of
    the padded vocabulary; labels is (B, S) int64. The gradient of hidden is this rank's partial
    sum, to be reduced over the group (by the model's `pre_collective`). Under autocast the
    matrix products use its dtype. Call it while the weight is gathered (under ZeRO 3 only inside
    the head); backward can run once.
    """
    loss = vocab_loss(len(weight), vocab_size, topology, ops, z_loss)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    sums = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), loss, learns)
    return torch.stack(sums)


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: VocabLoss,
    part: slice,
    gradients: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return losses and z-losses (n,) of a chunk; write the gradient of hidden, add the other."""
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
    """Return the tokens per chunk, at most tokens / chunks where possible."""
    most = max(1, tokens // chunks)
    return most - most % TILE if most >= TILE else most


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
