"""Operations of a model whose sequences are sharded over context-parallel ranks.

Only attention and the two operations of Mamba read other positions of the sequence. They exchange
activations between ranks around the same operation of the selected backend.

Shapes: B batch, S sequence, P context-parallel ranks, H query heads, G key/value heads, K head
dimension, C channels, N states of a channel, W taps of a convolution.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megagrow.model.decoder import CausalLM
from megagrow.model.ops import Ops, document_starts
from megagrow.parallel.collectives import ProcessGroup, exchange, gather_from_sequence
from megagrow.parallel.context.shards import (
    SequenceShard,
    natural_order,
    rank_order,
    shard_of,
)
from megagrow.parallel.process_groups import Topology


def context_parallel_ops(ops: Ops, topology: Topology, comm_type: str) -> Ops:
    """Return the operations on this rank's shard of the sequence; `ops` without such ranks.

    `comm_type` is `parallel.cp_comm_type`.
    """
    if topology.cp_group is None:
        return ops
    wrapped = _WRAPPERS[comm_type](ops, shard_of(topology), topology.cp_group)
    return replace(
        ops,
        pack=wrapped.pack,
        attention_mask=wrapped.attention_mask,
        attention=wrapped.attention,
        document_starts=_starts,
        causal_conv=wrapped.causal_conv,
        selective_scan=wrapped.selective_scan,
    )


@contextmanager
def model_with_ops(model: CausalLM, ops: Ops) -> Iterator[None]:
    """Context in which a model computes with other operations."""
    before = model.ops
    try:
        model.ops = model.model.ops = ops
        yield
    finally:
        model.ops = model.model.ops = before


@dataclass(frozen=True)
class ShardDocuments:
    """Documents of the full sequences, in the formats of the operations."""

    packed: tuple[Any, ...]
    """Result of `Ops.pack` of the backend for each of its calls."""
    starts: Tensor
    """(B, S) bool, True at the first token of each document."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ShardDocuments":
        """Return a copy on a device; non-blocking as torch.Tensor.to."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ShardDocuments":
        """Return a copy in pinned memory."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> "ShardDocuments":
        return ShardDocuments(tuple(map(function, self.packed)), function(self.starts))


def _starts(documents: ShardDocuments | None, position_ids: Tensor) -> Tensor | None:
    return None if documents is None else documents.starts


@dataclass(frozen=True)
class _ShardedOps:
    """Operations on a shard. Mamba's run on full sequences of C / P channels."""

    ops: Ops
    shard: SequenceShard
    group: ProcessGroup

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
        """Return `Ops.causal_conv` of x (B, S/P, C)."""
        weight, bias = self._slice(weight), self._slice(bias)
        return self._to_shard(self.ops.causal_conv(self._to_heads(x), weight, bias, starts))

    def selective_scan(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Return `Ops.selective_scan` of x and dt (B, S/P, C), B and C (B, S/P, N)."""
        x, dt = self._to_heads(x), self._to_heads(dt)
        A, D, dt_bias = map(self._slice, (A, D, dt_bias))
        B, C = self._gathered(B), self._gathered(C)
        return self._to_shard(self.ops.selective_scan(x, dt, A, B, C, D, dt_bias, starts))

    def _slice(self, weight: Tensor) -> Tensor:
        """Return the channels of this rank. Its gradient is complete, and 0 in other channels: the
        sum over data x context parallel ranks adds them up."""
        return weight.chunk(self.shard.ranks)[self.shard.rank]

    def _gathered(self, x: Tensor) -> Tensor:
        """Return the full sequence of x (B, S/P, ...); its gradient is summed over the ranks."""
        return natural_order(gather_from_sequence(x, self.group), self.shard.ranks)

    def _to_heads(self, x: Tensor) -> Tensor:
        """Exchange a shard (B, S/P, H, ...) for full sequences of some heads (B, S, H/P, ...)."""
        parts = x.unflatten(2, (self.shard.ranks, -1)).movedim(2, 0)
        received = exchange(parts, self.group)
        return natural_order(received.transpose(0, 1).flatten(1, 2), self.shard.ranks)

    def _to_shard(self, x: Tensor) -> Tensor:
        """Exchange full sequences of some heads (B, S, H/P, ...) for a shard (B, S/P, H, ...)."""
        ordered = rank_order(x, self.shard.ranks)
        parts = ordered.unflatten(1, (self.shard.ranks, -1)).transpose(0, 1)
        return exchange(parts, self.group).movedim(0, 2).flatten(2, 3)


class _GatheredKeys(_ShardedOps):
    """Attention of this rank's queries to the keys and values of all ranks.

    Each half of the queries attends to the keys up to its end, which are a prefix of the sequence.
    """

    def pack(self, document_ids: Tensor) -> ShardDocuments:
        """Return the documents of both halves of the shard, from the ids of full sequences."""
        size, ends = self._halves(document_ids.shape[1])
        packed = tuple(self.ops.pack(document_ids[:, :end], size) for end in ends)
        return ShardDocuments(packed, document_starts(document_ids))

    def attention_mask(
        self, documents: ShardDocuments | None, position_ids: Tensor, window: int | None
    ) -> tuple[Any, ...]:
        """Return the masks of both halves of the shard; position_ids is (B, S/P)."""
        rows, local = position_ids.shape
        size, ends = self._halves(local * self.shard.ranks)
        packed = (None, None) if documents is None else documents.packed
        keys = (position_ids.new_zeros(()).expand(rows, end) for end in ends)
        return tuple(
            self.ops.attention_mask(each, positions, window, size)
            for each, positions in zip(packed, keys, strict=True)
        )

    def attention(self, q: Tensor, k: Tensor, v: Tensor, masks: tuple[Any, ...]) -> Tensor:
        """Return attention of q (B, S/P, H, K) to k and v (B, S/P, G, K) of all ranks."""
        keys, values = self._gathered(torch.cat((k, v))).chunk(2)
        _, ends = self._halves(keys.shape[1])
        halves = zip(q.chunk(2, dim=1), ends, masks, strict=True)
        out = [
            self.ops.attention(half, keys[:, :end], values[:, :end], mask)
            for half, end, mask in halves
        ]
        return torch.cat(out, dim=1)

    def _halves(self, sequence: int) -> tuple[int, list[int]]:
        """Return the number of queries of a half, and the end of each half in the sequence."""
        size = sequence // (2 * self.shard.ranks)
        return size, [(chunk + 1) * size for chunk in self.shard.chunks]


class _ExchangedHeads(_ShardedOps):
    """Attention of H / P heads on full sequences (DeepSpeed-Ulysses, Jacobs et al. 2023,
    arXiv 2309.14509)."""

    def pack(self, document_ids: Tensor) -> ShardDocuments:
        """Return the documents of full sequences."""
        return ShardDocuments((self.ops.pack(document_ids),), document_starts(document_ids))

    def attention_mask(
        self, documents: ShardDocuments | None, position_ids: Tensor, window: int | None
    ) -> Any:
        """Return the mask of full sequences; position_ids is (B, S/P)."""
        rows, local = position_ids.shape
        positions = position_ids.new_zeros(()).expand(rows, local * self.shard.ranks)
        packed = None if documents is None else documents.packed[0]
        return self.ops.attention_mask(packed, positions, window)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Return attention of q (B, S/P, H, K) to k and v (B, S/P, G, K) of all ranks."""
        q, k, v = map(self._to_heads, (q, k, v))
        return self._to_shard(self.ops.attention(q, k, v, mask))


_WRAPPERS: Mapping[str, type[_GatheredKeys] | type[_ExchangedHeads]] = {
    "all_gather": _GatheredKeys,
    "a2a": _ExchangedHeads,
}
"""Operations by `parallel.cp_comm_type`."""
