"""What one rank sends to another: every element once, however often the target uses it.

A stack needs the same layer several times, a width copy the same rows and columns: the elements
travel once and are repeated where they arrive.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from megagrow.growth.map import GrowthMap, Indices
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.copy_plan import Copy, copies_from, copies_to
from megagrow.reshard.index_ranges import common, distinct, moved, pick, select, without
from megagrow.reshard.layout import Layout

_Patch = tuple[Indices, Indices]
"""All elements on some rows and some columns, both ascending."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """Elements of one source parameter that travel together, as a matrix (rows, cols).

    They lie within one block of the source rank. `uses` are what becomes of them: parts of copies
    whose `take_rows` and `take_cols` count within the parcel.
    """

    name: str
    kind: StateKind
    source_rank: int
    rows: Indices
    cols: Indices
    uses: list[Copy] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class TransferChunk:
    """Some rows of a parcel, counted within it: what fits into a round."""

    parcel: Transfer
    rows: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.parcel.cols)

    @property
    def numel(self) -> int:
        return len(self.rows) * len(self.parcel.cols)

    def uses(self) -> Iterator[Copy]:
        """The copies of these rows; their `take_rows` count from the first of them."""
        for use in self.parcel.uses:
            take_rows, places = select(use.take_rows, self.rows)
            if len(take_rows):
                yield replace(use, take_rows=take_rows, target_rows=pick(use.target_rows, places))


def pack(copies: Iterable[Copy]) -> list[Transfer]:
    """The copies of one pair of ranks as parcels that share no element.

    Both ends of the pair list the same copies, and so make the same parcels.
    """
    by_source: dict[tuple[StateKind, str], list[Transfer]] = {}
    for copy in copies:
        parcels = by_source.setdefault((copy.kind, copy.term.source), [])
        rows = moved(copy.take_rows, copy.source.rows.start)
        cols = moved(copy.take_cols, copy.source.cols.start)
        missing = [(distinct(rows), distinct(cols))]
        for parcel in parcels:
            had = parcel.rows, parcel.cols
            missing = [rest for patch in missing for rest in _left(patch, had)]
        head = copy.term.source, copy.kind, copy.source_rank
        parcels += [Transfer(*head, *patch) for patch in missing]
        for parcel in parcels:
            _use(copy, rows, cols, parcel)
    return [parcel for parcels in by_source.values() for parcel in parcels]


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank has to do in a reshard."""

    local: list[Copy]
    """Within its own memory."""
    outgoing: dict[int, list[Transfer]]
    """By the rank that it sends to."""
    incoming: dict[int, list[Transfer]]
    """By the rank that it receives from."""


def plan_rank(rank: int, source: Layout, growth: GrowthMap, target: Layout) -> RankPlan:
    """What `rank` has to do so that every rank's part of the target is filled."""
    outgoing: dict[int, list[Copy]] = {}
    incoming: dict[int, list[Copy]] = {rank: []}
    for kind in growth.kinds:
        for copy in copies_to(rank, source, growth, target, kind):
            incoming.setdefault(copy.source_rank, []).append(copy)
        for copy in copies_from(rank, source, growth, target, kind):
            outgoing.setdefault(copy.target_rank, []).append(copy)
    local = incoming.pop(rank)
    outgoing.pop(rank, None)
    return RankPlan(
        local, *({p: pack(c) for p, c in side.items()} for side in (outgoing, incoming))
    )


def rounds(parcels: Iterable[Transfer], limit: int) -> Iterator[list[TransferChunk]]:
    """Cuts the parcels of one pair of ranks into rounds of at most `limit` elements.

    A row is never cut; a single row longer than the limit makes a round of its own.
    """
    pieces: list[TransferChunk] = []
    free = limit
    for parcel in parcels:
        rows, cols = len(parcel.rows), len(parcel.cols)
        done = 0
        while done < rows:
            fitting = min(rows - done, free // cols)
            if fitting <= 0 and pieces:  # below 0 after a row longer than the limit
                yield pieces
                pieces, free = [], limit
                continue
            fitting = max(1, fitting)
            pieces.append(TransferChunk(parcel, range(done, done + fitting)))
            free -= fitting * cols
            done += fitting
    if pieces:
        yield pieces


def _left(patch: _Patch, had: _Patch) -> Iterator[_Patch]:
    """What of a patch is not in another one."""
    shared_rows, shared_cols = common(patch[0], had[0]), common(patch[1], had[1])
    if not len(shared_rows) or not len(shared_cols):
        yield patch
        return
    for rest in ((without(patch[0], had[0]), patch[1]), (shared_rows, without(patch[1], had[1]))):
        if len(rest[0]) and len(rest[1]):
            yield rest


def _use(copy: Copy, rows: Indices, cols: Indices, parcel: Transfer) -> None:
    """Adds to a parcel what a copy, which lists these source rows and columns, takes from it."""
    take_rows, row_places = select(rows, parcel.rows)
    take_cols, col_places = select(cols, parcel.cols)
    if len(take_rows) and len(take_cols):
        parcel.uses.append(
            replace(
                copy,
                take_rows=take_rows,
                take_cols=take_cols,
                target_rows=pick(copy.target_rows, row_places),
                target_cols=pick(copy.target_cols, col_places),
            )
        )
