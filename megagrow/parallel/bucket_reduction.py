"""Bucketed reduction of flat gradients to the ranks that own them, overlapped with backward.

ZeRO 1 and 2 partition each flat group into one contiguous share per data-parallel rank. A piece is
a range of a flat group within one share, so a bucket is a few reduces to owners. A ring reduce
sends as many bytes as its part of a reduce-scatter, and the pieces need not have equal sizes.

Buckets are launched in the order in which gradients arrive. All ranks run the same graph, so that
order is the same on all of them. On a GPU the collectives run on the stream of the process group.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from megagrow.parallel.materialize import zeros


class Piece(NamedTuple):
    """Range of a flat group that belongs to one data-parallel rank."""

    owner: int
    group: int
    start: int
    stop: int


class Reduction(Protocol):
    """Sum of gradients over the data-parallel ranks, on the owner of each piece."""

    def add(self, piece: Piece, gradient: Tensor, first: bool) -> None:
        """Add a local gradient (numel,) whose values are final for this reduction.

        The sum replaces the owner's values if `first`, else it is added to them.
        """

    def finish(self) -> None:
        """Launch the last bucket and wait for all; on a GPU only the current stream waits."""


class InPlaceReduction:
    """Reduce ranges of the flat gradients in place, in their own dtype.

    Afterwards the ranges of other owners hold unspecified values.
    """

    def __init__(self, flats: list[Tensor], bucket: int, group: dist.ProcessGroup) -> None:
        self._flats = flats
        self._bucket = bucket
        self._group = group
        self._pending: list[Piece] = []
        self._waiting = 0
        self._works: list[dist.Work] = []

    def add(self, piece: Piece, gradient: Tensor, first: bool) -> None:
        """Reduce a piece of the flat gradients, which contain `gradient` already."""
        self._pending.append(piece)
        self._waiting += piece.stop - piece.start
        if self._waiting >= self._bucket:
            self._launch()

    def finish(self) -> None:
        """Launch the last bucket and wait for all buckets."""
        self._launch()
        for work in self._works:
            work.wait()
        self._works = []

    def _launch(self) -> None:
        parts = [(p.owner, self._flats[p.group][p.start : p.stop]) for p in merged(self._pending)]
        self._works += start_reduces(parts, self._group)
        self._pending, self._waiting = [], 0


@dataclass
class _Stage:
    """Staging buffer of one bucket, and the pieces in it: (piece, offset, first)."""

    buffer: Tensor
    pieces: list[tuple[Piece, int, bool]] = field(default_factory=list)
    filled: int = 0
    works: list[dist.Work] = field(default_factory=list)


class StagedReduction:
    """Copy gradients to one of two staging buckets, reduce it, and add the sums to own shares.

    While one bucket is reduced, the other is filled. The buckets have the dtype of communication.
    """

    def __init__(
        self, shares: list[Tensor], bucket: int, dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        self._shares = shares
        self._group = group
        device = shares[0].device
        self._filling, self._reducing = (_Stage(zeros(bucket, dtype, device)) for _ in range(2))

    def add(self, piece: Piece, gradient: Tensor, first: bool) -> None:
        """Copy a piece to the staging buckets; a full bucket is launched."""
        start = piece.start
        while start < piece.stop:
            stage = self._filling
            stop = min(piece.stop, start + stage.buffer.numel() - stage.filled)
            here = piece._replace(start=start, stop=stop)
            end = stage.filled + stop - start
            stage.buffer[stage.filled : end].copy_(
                gradient[start - piece.start : stop - piece.start]
            )
            stage.pieces.append((here, stage.filled, first))
            stage.filled, start = end, stop
            if end == stage.buffer.numel():
                self._launch()

    def finish(self) -> None:
        """Launch the last bucket and wait for both."""
        self._launch()
        self._collect(self._reducing)

    def _launch(self) -> None:
        stage = self._filling
        parts = []
        for owner, run in groupby(stage.pieces, key=lambda staged: staged[0].owner):
            pieces = list(run)
            begin = pieces[0][1]
            end = begin + sum(piece.stop - piece.start for piece, _, _ in pieces)
            parts.append((owner, stage.buffer[begin:end]))
        stage.works = start_reduces(parts, self._group)
        self._collect(self._reducing)
        self._filling, self._reducing = self._reducing, stage

    def _collect(self, stage: _Stage) -> None:
        for work in stage.works:
            work.wait()
        mine = self._group.rank()
        for piece, offset, first in stage.pieces:
            if piece.owner == mine:
                total = stage.buffer[offset : offset + piece.stop - piece.start]
                share = self._shares[piece.group]
                begin = piece.start - mine * share.numel()
                into = share[begin : begin + total.numel()]
                into.copy_(total) if first else into.add_(total)
        stage.pieces, stage.works, stage.filled = [], [], 0


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces in ascending order, with adjacent ranges of one owner joined."""
    joined: Piece | None = None
    for piece in sorted(pieces):
        if joined and joined[:2] == piece[:2] and joined.stop == piece.start:
            joined = joined._replace(stop=piece.stop)
            continue
        if joined:
            yield joined
        joined = piece
    if joined:
        yield joined


def start_reduces(parts: Iterable[tuple[int, Tensor]], group: dist.ProcessGroup) -> list[dist.Work]:
    """Start the sum of each (owner, tensor) over a group, in place on the group's rank `owner`.

    NCCL gets all of them as one group call, as in torch's reduce-scatter of uneven sizes: with
    many ranks a bucket has many owners.
    """
    parts = list(parts)

    def start() -> list[dist.Work]:
        return [
            dist.reduce(tensor, group=group, group_dst=owner, async_op=True)
            for owner, tensor in parts
        ]

    if not parts:
        return []
    device = parts[0][1].device
    if not group._get_backend(device).supports_coalescing:
        return start()
    with _coalescing_manager(group, device, async_ops=True) as coalesced:
        start()
    return [coalesced]
