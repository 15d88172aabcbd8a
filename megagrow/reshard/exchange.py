"""Live resharding between ranks.

Ranks of one host read each other's shared memory. Between hosts and between GPUs, data is sent by
all-to-all (NCCL or gloo), one bucket at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.growth.map import GrowthMap
from megagrow.parallel.sharding import STATE_KINDS, StateKind, Storage
from megagrow.parallel.shared_memory import on_one_host, shared_copies
from megagrow.reshard.copy_ops import collect, deliver, move_within
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import RankPlan, Transfer, TransferChunk, plan_rank, rounds

_Round = tuple[Sequence[TransferChunk], ...]
"""Chunks sent to, or received from, each rank in one round."""

BUCKET_BYTES = 64 * 2**20
"""Limit of bytes in flight per rank, sent plus received."""


@dataclass(frozen=True)
class TransferStats:
    """Bytes moved by a reshard, as seen from one rank."""

    bytes_sent: int
    """Bytes that other ranks receive from this one; on one host, they read them in place."""
    bytes_between_pipeline_ranks: int
    """Those of `bytes_sent` to other pipeline ranks of the target."""
    bytes_local: int
    """Bytes copied from this rank's source to this rank's target."""
    rounds: int
    """All-to-all rounds; 0 on one host."""

    def plus(self, other: "TransferStats") -> "TransferStats":
        """Return the sum of two consecutive reshards."""
        return TransferStats(
            self.bytes_sent + other.bytes_sent,
            self.bytes_between_pipeline_ranks + other.bytes_between_pipeline_ranks,
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
    at most once, and not at all if the rank already has it. On one host, nothing is sent: if any
    element changes ranks, every rank's source storage moves to shared memory, and each rank copies
    from there. Dense terms are excluded (see `dense.py`).
    """
    plan = plan_rank(dist.get_rank(), source.layout, growth, target.layout)
    moves = _max_over_ranks(plan.numel_sent) > 0
    shared = moves and on_one_host()
    stored = {plan.rank: source.storage}
    if shared:
        stored = dict(enumerate(_share(source.layout, source.storage)))
    for rank, storage in stored.items():
        for copy in plan.copies.get(rank, ()):
            move_within(copy, source.layout, storage, target.layout, target.storage)
    count = _send(plan, source, target, bucket_bytes) if moves and not shared else 0
    away = plan.numel_between_pipeline_ranks(target.layout)
    return TransferStats(4 * plan.numel_sent, 4 * away, 4 * plan.numel_local, count)


def _share(layout: Layout, storage: Storage) -> list[Storage]:
    """Move each rank's storage to shared memory; return the storages of all ranks. Collective.

    Requires `on_one_host`. One state kind at a time is copied, replaced in `storage`, and freed.
    """
    memory = shared_copies(_drain(layout, storage), range(dist.get_world_size()))
    all_ranks = [_storage(layout, rank, shared) for rank, shared in enumerate(memory)]
    for name, kinds in storage.items():
        kinds.update(all_ranks[dist.get_rank()][name])
    return all_ranks


def _drain(layout: Layout, storage: Storage) -> Iterator[Tensor]:
    """Yield the tensors of a storage in the order of `_storage`; then free each state kind."""
    for kind in STATE_KINDS:
        held = [storage[name] for name in _names(layout, kind) if name in storage]
        for kinds in held:
            yield kinds[kind]
        for kinds in held:
            del kinds[kind]  # frees the flat tensor that they are views of


def _storage(layout: Layout, rank: int, memory: Tensor) -> Storage:
    """Return a rank's storage as views of its memory, (bytes,) uint8, one state kind at a time."""
    sizes = {name: len(layout.interval(name, rank)) for name in layout.plan}
    storage: Storage = {name: {} for name, size in sizes.items() if size}
    places = [(kind, name) for kind in STATE_KINDS for name in _names(layout, kind)]
    parts = memory.view(torch.float32).split([sizes[name] for _, name in places])
    for (kind, name), values in zip(places, parts, strict=True):
        if len(values):
            storage[name][kind] = values
    return storage


def _names(layout: Layout, kind: StateKind) -> list[str]:
    """Return the parameters that have a state."""
    return [name for name, spec in layout.plan.items() if kind in spec.kinds]


def _send(plan: RankPlan, source: ShardedState, target: ShardedState, bucket_bytes: int) -> int:
    """Exchange the transfers of all ranks and return the number of rounds. Collective."""
    to_peer, from_peer = _limits(plan, bucket_bytes // 4 // 2)
    send, receive = _rounds(plan.outgoing, to_peer), _rounds(plan.incoming, from_peer)
    count = _max_over_ranks(max(len(send), len(receive)))
    empty: _Round = ((),) * dist.get_world_size()
    for index in range(count):
        to_send = send[index] if index < len(send) else empty
        to_receive = receive[index] if index < len(receive) else empty
        _one_round(to_send, to_receive, source, target)
    return count


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


def _one_round(send: _Round, receive: _Round, source: ShardedState, target: ShardedState) -> None:
    sizes, coming = _sizes(send), _sizes(receive)
    sent = torch.empty(sum(sizes), device=group_device())
    for chunks, buffer in zip(send, sent.split(sizes), strict=True):
        for chunk, part in _parts(chunks, buffer):
            collect(chunk, part, source.layout, source.storage)
    received = torch.empty(sum(coming), device=group_device())
    dist.all_to_all_single(received, sent, coming, sizes)
    for chunks, buffer in zip(receive, received.split(coming), strict=True):
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


def group_device() -> torch.device:
    """Return the device of tensors that the process group can send."""
    gpu = None if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    return gpu or torch.device("cpu")
