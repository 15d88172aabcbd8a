"""Zig-zag shards of a sequence, which give all context-parallel ranks equal work.

A sequence is cut into 2 P chunks for P ranks. Rank r holds chunks r and 2 P - 1 - r, in this order:
with causal attention a later chunk attends to more keys, and the sum is the same for all ranks
(Llama 3, arXiv 2407.21783, section 3.3.2).

Shapes: B batch, S sequence; the sequence is dimension 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow.parallel.process_groups import Topology


@dataclass(frozen=True)
class SequenceShard:
    """Part of every sequence that one context-parallel rank holds."""

    rank: int = 0
    ranks: int = 1

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of this rank among the 2 `ranks` chunks of a sequence."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def of(self, x: Tensor) -> Tensor:
        """Return this rank's part of x (B, S, ...): (B, S / ranks, ...)."""
        if self.ranks == 1:
            return x
        parts = x.chunk(2 * self.ranks, dim=1)
        return torch.cat([parts[index] for index in self.chunks], dim=1)


def shard_of(topology: Topology) -> SequenceShard:
    """Return the part of the sequence on this rank."""
    return SequenceShard(topology.cp_rank, topology.cp)


def rank_order(x: Tensor, ranks: int) -> Tensor:
    """Return x (B, S, ...) with the shards of all ranks one after the other."""
    return _reordered(x, _order(ranks))


def natural_order(x: Tensor, ranks: int) -> Tensor:
    """Return the shards of all ranks (B, S, ...), one after the other, in the sequence's order."""
    order = _order(ranks)
    return _reordered(x, [order.index(chunk) for chunk in range(len(order))])


def _order(ranks: int) -> list[int]:
    return [chunk for rank in range(ranks) for chunk in SequenceShard(rank, ranks).chunks]


def _reordered(x: Tensor, order: list[int]) -> Tensor:
    parts = x.chunk(len(order), dim=1)
    return torch.cat([parts[index] for index in order], dim=1)
