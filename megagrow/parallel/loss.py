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
