"""Copy plan of a reshard: block copies from source ranks to target ranks.

The plan composes source layout, growth map and target layout into block copies. The number of
copies grows with the number of blocks, not of elements. Each rank plans only the copies that it
sends or receives.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megagrow.growth.map import Axis, Gather, GrowthMap, Indices, Term
from megagrow.parallel.optimizers.rules import source_kind
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.index_ranges import bounds, pick, select
from megagrow.reshard.layout import Block, Layout


@dataclass(frozen=True, eq=False)
class Copy:
    """Copy of source elements (rows x cols) of one rank to target elements of another.

    Positions refer to the logical tensors. `source` is the block read on the source rank.
    `take_rows` and `take_cols` index its rows and columns relative to its first element; indices
    may repeat. The selected elements are written to `target_rows` and `target_cols` in order.
    """

    name: str
    kind: StateKind
    term: Gather
    adds: bool
    """True: add to the target; False: overwrite it."""
    read_kind: StateKind
    """State that is read at the source; another one than `kind` if the optimizer changes."""
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
    """Yield all copies of one state kind into the target blocks of `rank`, in a fixed order.

    Dense terms are not copies. Replicated values are read from the replica at or near rank
    `near`, by default `rank` itself.
    """
    near = rank if near is None else near
    for name, term, adds, read in gathers(source, growth, target, kind):
        for block in target.blocks(name, rank):
            rows, cols = term.rows.source(block.rows), term.cols.source(block.cols)
            wanted = Block(bounds(rows), bounds(cols))
            if wanted:
                for holder, held in source.holders(term.source, wanted, near):
                    yield from _copy(
                        (name, kind, term, adds, read, holder, rank), held, block, rows, cols
                    )


def copies_from(
    rank: int, source: Layout, growth: GrowthMap, target: Layout, kind: StateKind
) -> Iterator[Copy]:
    """Yield all copies of one state kind that read source blocks of `rank`.

    For each target rank, these are the copies from `rank` in `copies_to` of the target rank, in the
    same order. The cost is proportional to the number of copies and of ranks that hold part of
    their targets.
    """
    for name, term, adds, read in gathers(source, growth, target, kind):
        held = list(source.blocks(term.source, rank))
        for reader in _readers(rank, source, term, target, name, held):
            for block in target.blocks(name, reader):
                rows, cols = term.rows.source(block.rows), term.cols.source(block.cols)
                wanted = Block(bounds(rows), bounds(cols))
                for part in (mine.within(wanted) for mine in held):
                    if part:
                        yield from _copy(
                            (name, kind, term, adds, read, rank, reader), part, block, rows, cols
                        )


def gathers(
    source: Layout, growth: GrowthMap, target: Layout, kind: StateKind
) -> Iterator[tuple[str, Gather, bool, StateKind]]:
    """Yield (target parameter, gather term, adds to existing values, state of the source)."""
    for name, term, read in terms_of(source, growth, target, kind):
        if isinstance(term, Gather):
            yield name, term, kind == "fp32" and growth.adds(name), read


def terms_of(
    source: Layout, growth: GrowthMap, target: Layout, kind: StateKind
) -> Iterator[tuple[str, Term, StateKind]]:
    """Yield (target parameter, term of one of its states, state of the source that it reads)."""
    for name, spec in target.plan.items():
        for term in growth.terms(name, kind) if kind in spec.kinds else ():
            read = source_kind(kind, source.plan[term.sources[0]].kinds)
            if read is not None:
                yield name, term, read


def _readers(
    rank: int, source: Layout, term: Gather, target: Layout, name: str, held: list[Block]
) -> list[int]:
    """Return the target ranks that may read from the blocks of a source rank."""
    spec = target.plan[name]
    touched: set[int] = set()
    for block in held:
        rows = _reading(term.rows, spec.rows, block.rows)
        cols = _reading(term.cols, spec.cols, block.cols)
        if len(rows) and len(cols):
            touched.update(target.touched(name, rows, cols))
    return sorted(reader for reader in touched if source.serves(term.source, rank, reader))


def _reading(axis: Axis, size: int, held: range) -> Indices:
    """Return the target positions whose source position is in `held`."""
    return select(axis.source(range(size)), held)[1]


def _copy(
    head: tuple[str, StateKind, Gather, bool, StateKind, int, int],
    held: Block,
    block: Block,
    rows: Indices,
    cols: Indices,
) -> Iterator[Copy]:
    """Yield the copy from a source rank's block to a target block, if they intersect.

    `rows` and `cols` are the source positions of the target block's rows and columns.
    """
    take_rows, row_places = select(rows, held.rows)
    take_cols, col_places = select(cols, held.cols)
    if len(take_rows) and len(take_cols):
        to_rows, to_cols = pick(block.rows, row_places), pick(block.cols, col_places)
        yield Copy(*head, held, take_rows, take_cols, to_rows, to_cols)
