"""Forward pass of a model that is evaluated, and logits whose vocabulary is sharded.

The vocabulary may be sharded over tensor-parallel ranks. Scoring never gathers the logits.

Shapes: P positions, N tokens to score, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.model.decoder import HeadLoss
from megagrow.model.decoding import DecodingCache
from megagrow.parallel.collectives import gather
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import real_rows


class ForwardModel(Protocol):
    """Forward pass of a model: loaded from a checkpoint, or in training."""

    @property
    def config(self) -> ModelConfig:
        """Configuration of the model."""

    def forward_head(
        self, ids: Tensor, head: HeadLoss, result: Tensor, cache: DecodingCache | None = None
    ) -> None:
        """Write the value of `head` for (B, S) int64 token ids to `result`, on all ranks.

        Collective over the tensor- and pipeline-parallel ranks. Only the last pipeline rank calls
        `head`. With `cache`, the ids are the result of `DecodingCache.begin`.
        """

    def finish(self) -> None:
        """Return when all ranks have called it. Called by each rank after its last pass."""


def positions_of(ids: Tensor, columns: int, cache: DecodingCache | None) -> Tensor:
    """Return the positions of token ids (B, S): those of `cache`, or 0 to `columns` - 1.

    Padding after the first `columns` columns repeats the last position: it stays within the context
    length, beyond which dynamic rotary scaling would change all positions.
    """
    if cache is not None:
        return cache.sequences.positions(ids.shape[1])
    positions = torch.arange(ids.shape[1], device=ids.device).clamp(max=columns - 1)
    return positions.expand_as(ids)


@dataclass(frozen=True)
class VocabShard:
    """Operations on this rank's columns of logits. Collective over the tensor-parallel group."""

    vocab_size: int
    """Number of tokens, without padding."""
    topology: Topology

    def most_likely(self, logits: Tensor) -> Tensor:
        """Return the most likely tokens (P,) int64 of logits (P, V/tp)."""
        return self._most_likely(self._real(logits), logits.shape[1])

    def score(self, logits: Tensor, owners: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores (N,) fp32 of tokens `labels` at positions `owners` (both (N,) int64).

        Scores are log-probabilities in nats. The second result is `most_likely(logits)`.
        """
        width = logits.shape[1]
        logits = self._real(logits)
        own = labels - self.topology.tp_rank * width
        mine = (own >= 0) & (own < logits.shape[1])
        targets = logits[owners, own.masked_fill(~mine, 0)].masked_fill(~mine, 0.0)
        log_total = logits.logsumexp(dim=-1)
        if self.topology.tp > 1:
            dist.all_reduce(targets, group=self.topology.tp_group)
            log_total = torch.logsumexp(self._all_gather(log_total), dim=0)
        return targets - log_total[owners], self._most_likely(logits, width)

    def gather(self, logits: Tensor) -> Tensor:
        """Return the logits (P, V) of all tokens, in fp32, for logits (P, V/tp)."""
        parts = self._all_gather(logits.float()) if self.topology.tp > 1 else logits.float()[None]
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size]

    def _real(self, logits: Tensor) -> Tensor:
        """Return the columns that are tokens, in fp32."""
        rows = real_rows(self.vocab_size, logits.shape[1], self.topology.tp_rank)
        return logits[:, :rows].float()

    def _most_likely(self, logits: Tensor, width: int) -> Tensor:
        top, best = logits.max(dim=-1)
        best = best + self.topology.tp_rank * width
        if self.topology.tp == 1:
            return best
        # Ties go to the lowest rank, as they go to the lowest index on a single device.
        leader = self._all_gather(top).max(dim=0).indices
        return self._all_gather(best).gather(0, leader[None])[0]

    def _all_gather(self, values: Tensor) -> Tensor:
        """Stack the values of all tensor-parallel ranks to (tp, ...)."""
        return gather(values, self.topology.tp_group)
