"""The plan of a reshard: which block of which rank becomes which block of which rank.

source layout, growth map and target layout are composed into copies of blocks. The number of
copies grows with the number of blocks, not of elements, and a rank plans what it receives and what
it sends, and nothing of what goes on between others.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megagrow.growth.map import Axis, Gather, GrowthMap, Indices
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.index_ranges import bounds, pick, select
from megagrow.reshard.layout import Block, Layout


@dataclass(frozen=True, eq=False)
class Copy:
    """Source elements (rows x cols) of one rank become target elements of another.

    All positions are those of the logical tensors. `source` is the block that the source rank
    reads; `take_rows` and `take_cols` say which of its rows and columns, counted from its corner,
    go to `target_rows` and `target_cols`, in order and as often as they are listed.
    """

    name: str
    kind: StateKind
    term: Gather
    adds: bool
    """Whether the elements are added to what the target holds, or take its place."""
    source_rank: int
    target_rank: int
    source: Block
    take_rows: Indices
    take_cols: Indices
    target_rows: Indices
    target_cols: Indices

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.target_rows), len(self.target_cols)


def copies_to(
    rank: int,
    source: Layout,
    growth: GrowthMap,
    target: Layout,
    kind: StateKind,
    near: int | None = None,
) -> Iterator[Copy]:
    """Every copy of one kind of state that fills what `rank` holds in the target layout, in a
    fixed order. Dense terms are no copies.

    Of replicated numbers the copy at or near rank `near` is read, by default at `rank` itself.
    """
    near = rank if near is None else near
    for name, term, adds in gathers(growth, target, kind):
        for block in target.blocks(name, rank):
            rows, cols = term.rows.source(block.rows), term.cols.source(block.cols)
            wanted = Block(bounds(rows), bounds(cols))
            if wanted:
                for holder, held in source.holders(term.source, wanted, near):
                    yield from _copy(
                        (name, kind, term, adds, holder, rank), held, block, rows, cols
                    )


def copies_from(
    rank: int, source: Layout, growth: GrowthMap, target: Layout, kind: StateKind
) -> Iterator[Copy]:
    """Every copy of one kind of state that reads what `rank` holds in the source layout.

    For each target rank the same copies as `copies_to` of that rank has from `rank`, in the same
    order. The cost is that of the copies and of the ranks that hold something of their targets.
    """
    for name, term, adds in gathers(growth, target, kind):
        held = list(source.blocks(term.source, rank))
        for reader in _readers(rank, source, term, target, name, held):
            for block in target.blocks(name, reader):
                rows, cols = term.rows.source(block.rows), term.cols.source(block.cols)
                wanted = Block(bounds(rows), bounds(cols))
                for part in (mine.within(wanted) for mine in held):
                    if part:
                        yield from _copy(
                            (name, kind, term, adds, rank, reader), part, block, rows, cols
                        )


def gathers(
    growth: GrowthMap, target: Layout, kind: StateKind
) -> Iterator[tuple[str, Gather, bool]]:
    """Each gather with its target parameter, and whether it adds to what is there."""
    for name in target.plan:
        adds = kind == "fp32" and growth.adds(name)
        for term in growth.terms(name, kind):
            if isinstance(term, Gather):
                yield name, term, adds


def _readers(
    rank: int, source: Layout, term: Gather, target: Layout, name: str, held: list[Block]
) -> list[int]:
    """The target ranks that may need something of the blocks that a source rank holds."""
    spec = target.plan[name]
    found: set[int] = set()
    for block in held:
        rows = _reading(term.rows, spec.rows, block.rows)
        cols = _reading(term.cols, spec.cols, block.cols)
        if len(rows) and len(cols):
            found.update(target.touched(name, rows, cols))
    return sorted(reader for reader in found if source.serves(term.source, rank, reader))


def _reading(axis: Axis, size: int, held: range) -> Indices:
    """The target positions whose source position is held."""
    return select(axis.source(range(size)), held)[1]


def _copy(
    head: tuple[str, StateKind, Gather, bool, int, int],
    held: Block,
    block: Block,
    rows: Indices,
    cols: Indices,
) -> Iterator[Copy]:
    """The copy of what a source rank's block gives to a target block, if it gives anything.

    `rows` and `cols` are the source positions of the target block's rows and columns.
    """
    take_rows, row_places = select(rows, held.rows)
    take_cols, col_places = select(cols, held.cols)
    if len(take_rows) and len(take_cols):
        to_rows, to_cols = pick(block.rows, row_places), pick(block.cols, col_places)
        yield Copy(*head, held, take_rows, take_cols, to_rows, to_cols)
