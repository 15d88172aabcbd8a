"""The live reshard: every rank sends what it has and receives what it needs, bucket by bucket."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.growth.map import GrowthMap
from megagrow.parallel.engine import Storage
from megagrow.reshard.copy_ops import collect, deliver, move_within
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import RankPlan, Transfer, TransferChunk, plan_rank, rounds
from megagrow.reshard.transport import (
    Carrier,
    Network,
    SharedMemory,
    group_device,
    on_one_host,
)

_Round = tuple[Sequence[TransferChunk], ...]
"""The pieces that go to each rank, or come from it."""

BUCKET_BYTES = 64 * 2**20
"""What one rank may hold in flight, sent and received together."""


@dataclass(frozen=True)
class TransferStats:
    """What a reshard moved, seen from one rank."""

    bytes_sent: int
    bytes_local: int
    """What this rank's target took from this rank's source."""
    rounds: int

    def plus(self, other: "TransferStats") -> "TransferStats":
        """Both, one after the other."""
        return TransferStats(
            self.bytes_sent + other.bytes_sent,
            self.bytes_local + other.bytes_local,
            self.rounds + other.rounds,
        )


@dataclass(frozen=True)
class ShardedState:
    """One side of a reshard: who holds what, and this rank's part of it."""

    layout: Layout
    storage: Storage


def exchange(
    source: ShardedState,
    growth: GrowthMap,
    target: ShardedState,
    bucket_bytes: int = BUCKET_BYTES,
) -> TransferStats:
    """Fills this rank's target storage from all ranks' source storage, on all ranks together.

    No rank holds more than its source, its target and one bucket at any time, and no element is
    sent to a rank that has it, or twice. Dense terms are left out (see `dense.py`).
    """
    plan = plan_rank(dist.get_rank(), source.layout, growth, target.layout)
    for copy in plan.local:
        move_within(copy, source.layout, source.storage, target.layout, target.storage)
    shared = on_one_host()
    buffers = SharedMemory.num_buffers if shared else Network.num_buffers
    to_peer, from_peer = _limits(plan, bucket_bytes // 4 // 2 // buffers)
    send, receive = _rounds(plan.outgoing, to_peer), _rounds(plan.incoming, from_peer)
    largest = max((sum(_sizes(buffers)) for buffers in send), default=0)
    count = _highest(max(len(send), len(receive)))
    if count > 0:
        carrier = SharedMemory(largest) if shared else Network(group_device())
        nothing: _Round = ((),) * dist.get_world_size()
        for index in range(count):
            to_send = send[index] if index < len(send) else nothing
            to_receive = receive[index] if index < len(receive) else nothing
            _one_round(carrier, to_send, to_receive, source, target)
    sent = sum(sum(_sizes(buffers)) for buffers in send)
    local = sum(copy.shape[0] * copy.shape[1] for copy in plan.local)
    return TransferStats(bytes_sent=4 * sent, bytes_local=4 * local, rounds=count)


def _limits(plan: RankPlan, elements: int) -> tuple[list[int], list[int]]:
    """How many elements go to each peer, and come from each, in a round at most.

    Both ends of a pair cut their common parcels by the same limit, into the same rounds: each has
    `elements` for all those that it sends to, and as many for those that it receives from.
    """
    counts = torch.tensor([len(plan.outgoing), len(plan.incoming)], device=group_device())
    everyone = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, counts)
    senders, receivers = (max(1, count) for count in counts.tolist())
    others = [(max(1, sends), max(1, receives)) for sends, receives in map(Tensor.tolist, everyone)]
    to_peer = [max(1, elements // max(senders, receives)) for _, receives in others]
    from_peer = [max(1, elements // max(receivers, sends)) for sends, _ in others]
    return to_peer, from_peer


def _rounds(parcels: dict[int, list[Transfer]], limits: list[int]) -> list[_Round]:
    """Round by round the pieces that go to each peer, or come from it."""
    by_peer = [rounds(parcels.get(peer, ()), limit) for peer, limit in enumerate(limits)]
    return list(zip_longest(*by_peer, fillvalue=()))


def _one_round(
    carrier: Carrier, send: _Round, receive: _Round, source: ShardedState, target: ShardedState
) -> None:
    for pieces, buffer in zip(send, carrier.buffers(_sizes(send)), strict=True):
        for piece, part in _parts(pieces, buffer):
            collect(piece, part, source.layout, source.storage)
    for pieces, buffer in zip(receive, carrier.all_to_all(_sizes(receive)), strict=True):
        for piece, part in _parts(pieces, buffer):
            for use in piece.uses():
                deliver(use, part, target.layout, target.storage)


def _sizes(buffers: _Round) -> list[int]:
    return [sum(piece.numel for piece in pieces) for pieces in buffers]


def _parts(
    pieces: Sequence[TransferChunk], buffer: Tensor
) -> Iterator[tuple[TransferChunk, Tensor]]:
    offset = 0
    for piece in pieces:
        yield piece, buffer.narrow(0, offset, piece.numel).view(piece.shape)
        offset += piece.numel


def _highest(value: int) -> int:
    tensor = torch.tensor([value], device=group_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
