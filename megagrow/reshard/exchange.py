"""Live resharding between ranks, one bucket at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.growth.map import GrowthMap
from megagrow.parallel.sharding import Storage
from megagrow.parallel.shared_memory import on_one_host
from megagrow.reshard.copy_ops import collect, deliver, move_within
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import RankPlan, Transfer, TransferChunk, plan_rank, rounds
from megagrow.reshard.transport import (
    Network,
    SharedMemory,
    Transport,
    group_device,
)

_Round = tuple[Sequence[TransferChunk], ...]
"""Chunks sent to, or received from, each rank in one round."""

BUCKET_BYTES = 64 * 2**20
"""Limit of bytes in flight per rank, sent plus received."""


@dataclass(frozen=True)
class TransferStats:
    """Bytes moved by a reshard, as seen from one rank."""

    bytes_sent: int
    bytes_local: int
    """Bytes copied from this rank's source to this rank's target."""
    rounds: int

    def plus(self, other: "TransferStats") -> "TransferStats":
        """Return the sum of two consecutive reshards."""
        return TransferStats(
            self.bytes_sent + other.bytes_sent,
            self.bytes_local + other.bytes_local,
            self.rounds + other.rounds,
        )


@dataclass(frozen=True)
class ShardedState:
    """Layout of a sharded state and this rank's storage of it."""

    layout: Layout
    storage: Storage


def exchange(
    source: ShardedState,
    growth: GrowthMap,
    target: ShardedState,
    bucket_bytes: int = BUCKET_BYTES,
) -> TransferStats:
    """Fill this rank's target storage from all ranks' source storage. Collective.

    A rank never holds more than its source, its target and one bucket. An element is sent to a rank
    at most once, and not at all if the rank already has it. Dense terms are excluded (see
    `dense.py`).
    """
    plan = plan_rank(dist.get_rank(), source.layout, growth, target.layout)
    for copy in plan.local:
        move_within(copy, source.layout, source.storage, target.layout, target.storage)
    shared = on_one_host()
    buffers = SharedMemory.num_buffers if shared else Network.num_buffers
    to_peer, from_peer = _limits(plan, bucket_bytes // 4 // 2 // buffers)
    send, receive = _rounds(plan.outgoing, to_peer), _rounds(plan.incoming, from_peer)
    largest = max((sum(_sizes(buffers)) for buffers in send), default=0)
    count = _max_over_ranks(max(len(send), len(receive)))
    if count > 0:
        transport = SharedMemory(largest) if shared else Network(group_device())
        empty: _Round = ((),) * dist.get_world_size()
        for index in range(count):
            to_send = send[index] if index < len(send) else empty
            to_receive = receive[index] if index < len(receive) else empty
            _one_round(transport, to_send, to_receive, source, target)
    sent = sum(sum(_sizes(buffers)) for buffers in send)
    local = sum(copy.shape[0] * copy.shape[1] for copy in plan.local)
    return TransferStats(bytes_sent=4 * sent, bytes_local=4 * local, rounds=count)


def _limits(plan: RankPlan, elements: int) -> tuple[list[int], list[int]]:
    """Return the per-peer limits of elements sent and received in one round.

    Both ranks of a pair split their transfers by the same limit and therefore into the same rounds.
    Each rank divides `elements` among the peers it sends to, and the same number among the peers it
    receives from.
    """
    counts = torch.tensor([len(plan.outgoing), len(plan.incoming)], device=group_device())
    everyone = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, counts)
    senders, receivers = (max(1, count) for count in counts.tolist())
    others = [
        (max(1, sends), max(1, receives))
        for sends, receives in (each.tolist() for each in everyone)
    ]
    to_peer = [max(1, elements // max(senders, receives)) for _, receives in others]
    from_peer = [max(1, elements // max(receivers, sends)) for sends, _ in others]
    return to_peer, from_peer


def _rounds(transfers: dict[int, list[Transfer]], limits: list[int]) -> list[_Round]:
    """Split the transfers of all peers into rounds."""
    by_peer = [rounds(transfers.get(peer, ()), limit) for peer, limit in enumerate(limits)]
    return list(zip_longest(*by_peer, fillvalue=()))


def _one_round(
    transport: Transport, send: _Round, receive: _Round, source: ShardedState, target: ShardedState
) -> None:
    for chunks, buffer in zip(send, transport.buffers(_sizes(send)), strict=True):
        for chunk, part in _parts(chunks, buffer):
            collect(chunk, part, source.layout, source.storage)
    for chunks, buffer in zip(receive, transport.all_to_all(_sizes(receive)), strict=True):
        for chunk, part in _parts(chunks, buffer):
            for use in chunk.uses():
                deliver(use, part, target.layout, target.storage)


def _sizes(chunks_by_peer: _Round) -> list[int]:
    return [sum(chunk.numel for chunk in chunks) for chunks in chunks_by_peer]


def _parts(
    chunks: Sequence[TransferChunk], buffer: Tensor
) -> Iterator[tuple[TransferChunk, Tensor]]:
    offset = 0
    for chunk in chunks:
        yield chunk, buffer.narrow(0, offset, chunk.numel).view(chunk.shape)
        offset += chunk.numel


def _max_over_ranks(value: int) -> int:
    tensor = torch.tensor([value], device=group_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
