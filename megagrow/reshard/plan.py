"""The plan of a reshard: which block of which rank becomes which block of which rank.

source layout, growth map and target layout are composed into copies of blocks. The number of
copies grows with the number of blocks, not of elements.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megagrow.growth.map import Axis, Gather, GrowthMap, Indices
from megagrow.reshard.layout import Block, Layout, overlap, shift


@dataclass(frozen=True)
class Copy:
    """Source elements (rows x cols) of one rank become target elements of another.

    All positions are those of the logical tensors. `source` is the block that the source rank
    reads; `take_rows` and `take_cols` say which of its rows and columns, counted from its corner,
    go to `target_rows` and `target_cols`, in order and as often as they are listed.
    """

    name: str
    term: Gather
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
    rank: int, source: Layout, growth: GrowthMap, target: Layout, near: int | None = None
) -> Iterator[Copy]:
    """Every copy that fills what `rank` holds in the target layout, in a fixed order.

    Of replicated numbers the copy at or near rank `near` is read, by default at `rank` itself.
    """
    near = rank if near is None else near
    for name in target.plan:
        term = growth.terms[name]
        for block in target.blocks(name, rank):
            rows, cols = term.rows.source(block.rows), term.cols.source(block.cols)
            wanted = Block(_span(rows), _span(cols))
            for holder, held in source.holders(term.source, wanted, near):
                take_rows, to_rows = _select(rows, block.rows, held.rows)
                take_cols, to_cols = _select(cols, block.cols, held.cols)
                if len(to_rows) and len(to_cols):
                    yield Copy(
                        name, term, holder, rank, held, take_rows, take_cols, to_rows, to_cols
                    )


def _span(positions: Indices) -> range:
    """The smallest range around the positions."""
    if isinstance(positions, range):
        return positions
    return range(int(positions.min()), int(positions.max()) + 1)


def _select(wanted: Indices, target: range, held: range) -> tuple[Indices, Indices]:
    """Of the wanted source positions those that are held: (counted from held, target position)."""
    if isinstance(wanted, range):
        found = overlap(wanted, held)
        return shift(found, -held.start), shift(found, target.start - wanted.start)
    where = np.flatnonzero((wanted >= held.start) & (wanted < held.stop))
    return wanted[where] - held.start, where + target.start


def scales(copy: Copy, kind: str, rows: range) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Row and column factors of some rows of a copy for `fp32`, `exp_avg` or `exp_avg_sq`."""
    chosen = copy.target_rows[rows.start : rows.stop]
    return _scale(copy.term.rows, kind, chosen), _scale(copy.term.cols, kind, copy.target_cols)


def _scale(axis: Axis, kind: str, positions: Indices) -> np.ndarray | None:
    scale = axis.scale if kind == "fp32" else axis.moment_scale
    if scale is None:
        return None
    chosen = scale[np.asarray(positions)]
    return chosen**2 if kind == "exp_avg_sq" else chosen
