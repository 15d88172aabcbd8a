"""Transfers between two ranks: each element is sent once, regardless of how often it is used.

Stacking reads the same layer several times, and a width copy reads the same rows and columns. The
elements are sent once and repeated at the destination.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from megagrow.growth.map import GrowthMap, Indices
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.copy_plan import Copy, copies_from, copies_to
from megagrow.reshard.index_ranges import common, distinct, moved, pick, select, without
from megagrow.reshard.layout import Layout

_Patch = tuple[Indices, Indices]
"""Outer product of rows and columns, both ascending."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """Elements of one source parameter that are sent together, as a matrix (rows, cols).

    They are part of one block of the source rank. `uses` are the copies that consume them, with
    `take_rows` and `take_cols` relative to the transfer.
    """

    name: str
    kind: StateKind
    """State of the source."""
    source_rank: int
    rows: Indices
    cols: Indices
    uses: list[Copy] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return len(self.rows) * len(self.cols)


@dataclass(frozen=True, eq=False)
class TransferChunk:
    """Rows of a transfer, relative to it, that are sent in one round."""

    transfer: Transfer
    rows: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.transfer.cols)

    @property
    def numel(self) -> int:
        return len(self.rows) * len(self.transfer.cols)

    def uses(self) -> Iterator[Copy]:
        """Yield the copies that consume these rows, with `take_rows` relative to the chunk."""
        for use in self.transfer.uses:
            take_rows, places = select(use.take_rows, self.rows)
            if len(take_rows):
                yield replace(use, take_rows=take_rows, target_rows=pick(use.target_rows, places))


def pack(copies: Iterable[Copy]) -> list[Transfer]:
    """Combine the copies of one pair of ranks into disjoint transfers.

    Both ranks of the pair pass the same copies and therefore build the same transfers.
    """
    by_source: dict[tuple[StateKind, str], list[Transfer]] = {}
    for copy in copies:
        transfers = by_source.setdefault((copy.read_kind, copy.term.source), [])
        rows = moved(copy.take_rows, copy.source.rows.start)
        cols = moved(copy.take_cols, copy.source.cols.start)
        missing = [(distinct(rows), distinct(cols))]
        for transfer in transfers:
            present = transfer.rows, transfer.cols
            missing = [rest for patch in missing for rest in _subtract(patch, present)]
        head = copy.term.source, copy.read_kind, copy.source_rank
        transfers += [Transfer(*head, *patch) for patch in missing]
        for transfer in transfers:
            _use(copy, rows, cols, transfer)
    return [transfer for transfers in by_source.values() for transfer in transfers]


@dataclass(frozen=True, eq=False)
class RankPlan:
    """Copies into one rank, and its transfers, in a reshard."""

    rank: int
    copies: dict[int, list[Copy]]
    """Copies into this rank by source rank, itself included."""
    outgoing: dict[int, list[Transfer]]
    """Transfers by destination rank."""

    @cached_property
    def incoming(self) -> dict[int, list[Transfer]]:
        """Transfers by source rank."""
        return {peer: pack(copies) for peer, copies in self.copies.items() if peer != self.rank}

    @property
    def numel_sent(self) -> int:
        """Elements sent to other ranks."""
        return sum(transfer.numel for sent in self.outgoing.values() for transfer in sent)

    def numel_between_pipeline_ranks(self, target: Layout) -> int:
        """Elements sent to other pipeline ranks of the target."""
        own = target.pp_rank(self.rank)
        away = (sent for peer, sent in self.outgoing.items() if target.pp_rank(peer) != own)
        return sum(transfer.numel for sent in away for transfer in sent)

    @property
    def numel_local(self) -> int:
        """Elements copied within the rank."""
        return sum(copy.shape[0] * copy.shape[1] for copy in self.copies.get(self.rank, ()))


def plan_rank(rank: int, source: Layout, growth: GrowthMap, target: Layout) -> RankPlan:
    """Return the plan of `rank` in a reshard that fills the target of every rank."""
    into: dict[int, list[Copy]] = {}
    out_of: dict[int, list[Copy]] = {}
    for kind in growth.kinds:
        for copy in copies_to(rank, source, growth, target, kind):
            into.setdefault(copy.source_rank, []).append(copy)
        for copy in copies_from(rank, source, growth, target, kind):
            out_of.setdefault(copy.target_rank, []).append(copy)
    out_of.pop(rank, None)
    return RankPlan(rank, into, {peer: pack(copies) for peer, copies in out_of.items()})


def rounds(transfers: Iterable[Transfer], limit: int) -> Iterator[list[TransferChunk]]:
    """Split the transfers of one pair of ranks into rounds of at most `limit` elements.

    Rows are never split; a row longer than the limit forms its own round.
    """
    chunks: list[TransferChunk] = []
    free = limit
    for transfer in transfers:
        rows, cols = len(transfer.rows), len(transfer.cols)
        done = 0
        while done < rows:
            fitting = min(rows - done, free // cols)
            if fitting <= 0 and chunks:  # negative after a row longer than the limit
                yield chunks
                chunks, free = [], limit
                continue
            fitting = max(1, fitting)
            chunks.append(TransferChunk(transfer, range(done, done + fitting)))
            free -= fitting * cols
            done += fitting
    if chunks:
        yield chunks


def _subtract(patch: _Patch, other: _Patch) -> Iterator[_Patch]:
    """Yield the parts of a patch that are outside another patch."""
    shared_rows, shared_cols = common(patch[0], other[0]), common(patch[1], other[1])
    if not len(shared_rows) or not len(shared_cols):
        yield patch
        return
    outside_rows, outside_cols = without(patch[0], other[0]), without(patch[1], other[1])
    for rest in ((outside_rows, patch[1]), (shared_rows, outside_cols)):
        if len(rest[0]) and len(rest[1]):
            yield rest


def _use(copy: Copy, rows: Indices, cols: Indices, transfer: Transfer) -> None:
    """Register with a transfer the part that a copy of these source rows and columns takes."""
    take_rows, row_places = select(rows, transfer.rows)
    take_cols, col_places = select(cols, transfer.cols)
    if len(take_rows) and len(take_cols):
        transfer.uses.append(
            replace(
                copy,
                take_rows=take_rows,
                take_cols=take_cols,
                target_rows=pick(copy.target_rows, row_places),
                target_cols=pick(copy.target_cols, col_places),
            )
        )
