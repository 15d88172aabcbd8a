"""The live reshard: every rank sends what it has and receives what it needs, bucket by bucket."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.growth.map import GrowthMap
from megagrow.parallel.zero import Storage
from megagrow.reshard.layout import Layout
from megagrow.reshard.move import read_rows, write_rows
from megagrow.reshard.plan import Copy, copies_to

BUCKET_BYTES = 64 * 2**20
"""What one rank may hold in flight, sent and received together."""


@dataclass(frozen=True)
class Piece:
    """Some rows of one copy: the unit that is sent."""

    copy: Copy
    rows: range

    @property
    def numel(self) -> int:
        return len(self.rows) * self.copy.shape[1]


@dataclass(frozen=True)
class Moved:
    """What a reshard moved, seen from one rank."""

    bytes_sent: int
    bytes_local: int
    rounds: int


@dataclass(frozen=True)
class Side:
    """One side of a reshard: who holds what, and this rank's part of it."""

    layout: Layout
    storage: Storage


def exchange(
    source: Side,
    growth: GrowthMap,
    target: Side,
    bucket_bytes: int = BUCKET_BYTES,
) -> Moved:
    """Fills this rank's target storage from all ranks' source storage, on all ranks together.

    No rank holds more than its source, its target and one bucket at any time.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    incoming: list[list[Copy]] = [[] for _ in range(world)]
    for copy in _copies(rank, source, growth, target):
        incoming[copy.source_rank].append(copy)
    outgoing = [
        [c for c in _copies(peer, source, growth, target) if c.source_rank == rank]
        if peer != rank
        else []
        for peer in range(world)
    ]
    local = _copy_locally(incoming[rank], source, target)
    incoming[rank] = []
    # Both ends of a pair cut their common list of copies by the same rule, into the same rounds.
    limit = max(1, bucket_bytes // 4 // 2 // max(1, world - 1))
    send = [list(_rounds(copies, limit)) for copies in outgoing]
    receive = [list(_rounds(copies, limit)) for copies in incoming]
    rounds = _highest(max(map(len, send + receive)))
    sent = 0
    for index in range(rounds):
        to_send = [pieces[index] if index < len(pieces) else [] for pieces in send]
        to_receive = [pieces[index] if index < len(pieces) else [] for pieces in receive]
        sent += _one_round(to_send, to_receive, source, target)
    return Moved(bytes_sent=4 * sent, bytes_local=4 * local, rounds=rounds)


def _copies(rank: int, source: Side, growth: GrowthMap, target: Side) -> Iterator[Copy]:
    for kind in growth.kinds:
        yield from copies_to(rank, source.layout, growth, target.layout, kind)


def _copy_locally(copies: list[Copy], source: Side, target: Side) -> int:
    moved = 0
    for pieces in _rounds(copies, BUCKET_BYTES // 4 // 2):
        for piece in pieces:
            at = (piece.copy, piece.rows)
            write_rows(
                *at, read_rows(*at, source.layout, source.storage), target.layout, target.storage
            )
            moved += piece.numel
    return moved


def _rounds(copies: list[Copy], limit: int) -> Iterator[list[Piece]]:
    """Cuts the copies of one pair of ranks into rounds of at most `limit` elements.

    A row is never cut; a single row longer than the limit makes a round of its own.
    """
    pieces: list[Piece] = []
    free = limit
    for copy in copies:
        rows, cols = copy.shape
        done = 0
        while done < rows:
            fitting = min(rows - done, free // cols)
            if fitting <= 0 and pieces:  # below 0 after a row longer than the limit
                yield pieces
                pieces, free = [], limit
                continue
            fitting = max(1, fitting)
            pieces.append(Piece(copy, range(done, done + fitting)))
            free -= fitting * cols
            done += fitting
    if pieces:
        yield pieces


def _one_round(
    send: list[list[Piece]], receive: list[list[Piece]], source: Side, target: Side
) -> int:
    device = _device()
    send_sizes = [sum(piece.numel for piece in pieces) for pieces in send]
    receive_sizes = [sum(piece.numel for piece in pieces) for pieces in receive]
    outbox = torch.empty(sum(send_sizes), device=device)
    inbox = torch.empty(sum(receive_sizes), device=device)
    for piece, part in _parts(send, outbox):
        part.copy_(read_rows(piece.copy, piece.rows, source.layout, source.storage))
    dist.all_to_all_single(inbox, outbox, receive_sizes, send_sizes)
    for piece, part in _parts(receive, inbox):
        write_rows(piece.copy, piece.rows, part, target.layout, target.storage)
    return outbox.numel()


def _parts(boxes: list[list[Piece]], buffer: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    offset = 0
    for pieces in boxes:
        for piece in pieces:
            part = buffer.narrow(0, offset, piece.numel)
            yield piece, part.view(len(piece.rows), piece.copy.shape[1])
            offset += piece.numel


def _highest(value: int) -> int:
    tensor = torch.tensor([value], device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
