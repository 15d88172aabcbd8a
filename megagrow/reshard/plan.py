"""The plan of a reshard: which block of which rank becomes which block of which rank.

source layout, growth map and target layout are composed into copies of blocks. The number of
copies grows with the number of blocks, not of elements.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megagrow.growth.map import Axis, Gather, GrowthMap, Indices, Kind
from megagrow.reshard.layout import Block, Layout, overlap, shift


@dataclass(frozen=True)
class Copy:
    """Source elements (rows x cols) of one rank become target elements of another.

    All positions are those of the logical tensors. `source` is the block that the source rank
    reads; `take_rows` and `take_cols` say which of its rows and columns, counted from its corner,
    go to `target_rows` and `target_cols`, in order and as often as they are listed.
    """

    name: str
    kind: Kind
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
    kind: Kind,
    near: int | None = None,
) -> Iterator[Copy]:
    """Every copy of one kind of state that fills what `rank` holds in the target layout, in a
    fixed order. Dense terms are no copies.

    Of replicated numbers the copy at or near rank `near` is read, by default at `rank` itself.
    """
    near = rank if near is None else near
    for name in target.plan:
        adds = kind == "fp32" and growth.adds(name)
        for term in growth.terms(name, kind):
            if isinstance(term, Gather):
                for block in target.blocks(name, rank):
                    yield from _copies_of(name, kind, term, adds, rank, block, source, near)


def _copies_of(
    name: str,
    kind: Kind,
    term: Gather,
    adds: bool,
    rank: int,
    block: Block,
    source: Layout,
    near: int,
) -> Iterator[Copy]:
    """The copies that fill one block of the target."""
    rows, cols = term.rows.source(block.rows), term.cols.source(block.cols)
    wanted = Block(_span(rows), _span(cols))
    if not wanted:
        return
    for holder, held in source.holders(term.source, wanted, near):
        take_rows, to_rows = _select(rows, block.rows, held.rows)
        take_cols, to_cols = _select(cols, block.cols, held.cols)
        if len(to_rows) and len(to_cols):
            yield Copy(
                *(name, kind, term, adds, holder, rank, held),
                *(take_rows, take_cols, to_rows, to_cols),
            )


def _span(positions: Indices) -> range:
    """The smallest range around the positions; -1 is none."""
    if isinstance(positions, range):
        return positions
    real = positions[positions >= 0]
    return range(int(real.min()), int(real.max()) + 1) if len(real) else range(0)


def _select(wanted: Indices, target: range, held: range) -> tuple[Indices, Indices]:
    """Of the wanted source positions those that are held: (counted from held, target position)."""
    if isinstance(wanted, range):
        found = overlap(wanted, held)
        return shift(found, -held.start), shift(found, target.start - wanted.start)
    where = np.flatnonzero((wanted >= held.start) & (wanted < held.stop))
    return wanted[where] - held.start, where + target.start


def scaled(values: Tensor, rows: Axis, cols: Axis, at_rows: Indices, at_cols: Indices) -> Tensor:
    """Values of these target rows and columns times the scales of both axes, in their own type."""
    for axis, positions, shape in ((rows, at_rows, (-1, 1)), (cols, at_cols, (1, -1))):
        if axis.scale is not None:
            factors = values.new_tensor(axis.scale[np.asarray(positions)])
            values = values * factors.view(shape)
    return values
