"""Layout: who holds which part of which parameter. Pure arithmetic, no tensors.

ZeRO always gives a rank one contiguous interval of a parameter's flattened tensor-parallel slice.
An interval of a matrix stored by rows is at most three blocks (the end of a row, whole rows, the
beginning of a row), so everything that follows is about rectangles.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megagrow.growth.map import Indices
from megagrow.parallel.sharding import ParamSpec, pad
from megagrow.reshard.index_ranges import bounds, overlap, pick, select, shift


class Block(NamedTuple):
    """A rectangle of a parameter, by its rows and columns."""

    rows: range
    cols: range

    def shifted(self, rows: int, cols: int) -> "Block":
        """The same rectangle seen from another origin."""
        return Block(shift(self.rows, rows), shift(self.cols, cols))

    def within(self, other: "Block") -> "Block":
        """What two rectangles share; false where they do not meet."""
        return Block(overlap(self.rows, other.rows), overlap(self.cols, other.cols))

    def __bool__(self) -> bool:
        return bool(self.rows) and bool(self.cols)


def blocks_of(interval: range, cols: int) -> Iterator[Block]:
    """The rectangles of an interval of a flattened matrix with `cols` columns, in order."""
    position = interval.start
    while position < interval.stop:
        row, col = divmod(position, cols)
        whole_rows = (interval.stop - position) // cols if col == 0 else 0
        if whole_rows:
            yield Block(range(row, row + whole_rows), range(cols))
            position += whole_rows * cols
        else:
            end = min(cols, col + interval.stop - position)
            yield Block(range(row, row + 1), range(col, end))
            position += end - col


@dataclass(frozen=True)
class Layout:
    """The partition of a model's state under ZeRO `zero_stage` x DP x TP.

    `groups` are the optimizer's parameter groups, names in the engine's order: ZeRO 1 and 2 lay
    each group out as one flat tensor and cut that. Rank = dp_rank * tp + tp_rank.
    """

    plan: dict[str, ParamSpec]
    groups: tuple[tuple[str, ...], ...]
    zero_stage: int
    dp: int
    tp: int

    def interval(self, name: str, dp_rank: int) -> range:
        """What a data-parallel rank holds of the flattened slice of a parameter; may be empty."""
        numel = self.plan[name].slice_numel(self.tp)
        if self.zero_stage == 0:
            return range(numel)
        offset, share = self._placed(name)
        mine = range(dp_rank * share - offset, (dp_rank + 1) * share - offset)
        return overlap(range(numel), mine)

    def blocks(self, name: str, rank: int) -> Iterator[Block]:
        """The rectangles of the logical tensor that a rank holds, in the order of its storage."""
        for block in blocks_of(self.interval(name, rank // self.tp), self._slice_cols(name)):
            clipped = self._clip(name, block.shifted(*self._origin(name, rank)))
            if clipped:
                yield clipped

    def local(self, name: str, rank: int, block: Block) -> tuple[int, int]:
        """(offset, row stride) of a logical block within the rank's stored interval."""
        row, col = self._origin(name, rank)
        cols = self._slice_cols(name)
        first = (block.rows.start - row) * cols + block.cols.start - col
        return first - self.interval(name, rank // self.tp).start, cols

    def parts(self, name: str, rank: int, wanted: Block) -> Iterator[Block]:
        """The rectangles of a logical block that a rank holds, in the order of its storage."""
        for block in self.blocks(name, rank):
            part = block.within(wanted)
            if part:
                yield part

    def holders(self, name: str, wanted: Block, near: int) -> Iterator[tuple[int, Block]]:
        """Which ranks hold a logical block, and which part each: disjoint parts that cover it.

        Where several ranks hold the same numbers, `near` gets them from itself if it can, else
        from a replica chosen so that the load is spread: from ranks that serve it.
        """
        for tp_rank in range(self.tp):
            for dp_rank in self._dp_ranks(name, tp_rank, wanted.rows, wanted.cols):
                rank = dp_rank * self.tp + tp_rank
                if self.serves(name, rank, near):
                    yield from ((rank, part) for part in self.parts(name, rank, wanted))

    def serves(self, name: str, rank: int, near: int) -> bool:
        """Whether `near` gets what it needs of a parameter from `rank`, if that holds it, and not
        from another rank that holds the same."""
        if self.plan[name].tp_dim is None and rank % self.tp != near % self.tp:
            return False
        return self.zero_stage > 0 or rank // self.tp == near // self.tp % self.dp

    def touched(self, name: str, rows: Indices, cols: Indices) -> list[int]:
        """All ranks that hold something of these rows and columns, replicas included.

        With scattered columns also ranks that hold something between them.
        """
        return [
            dp_rank * self.tp + tp_rank
            for tp_rank in range(self.tp)
            for dp_rank in self._dp_ranks(name, tp_rank, rows, bounds(cols))
        ]

    def writes(self, name: str, rank: int) -> bool:
        """Whether `rank` is the one that saves what it holds, where several hold the same."""
        first_dp = self.zero_stage > 0 or rank < self.tp
        return first_dp and (self.plan[name].tp_dim is not None or rank % self.tp == 0)

    def _dp_ranks(self, name: str, tp_rank: int, rows: Indices, cols: range) -> Iterable[int]:
        """Which data-parallel ranks hold something of these rows and columns of a slice."""
        mine = self._slice(name, tp_rank)
        rows, cols = pick(rows, select(rows, mine.rows)[1]), overlap(cols, mine.cols)
        if not len(rows) or not cols:
            return range(0)
        if self.zero_stage == 0:
            return range(self.dp)
        top, left = self.plan[name].slice_origin(self.tp, tp_rank)
        width = self._slice_cols(name)
        offset, share = self._placed(name)
        ends = (cols.start - left, cols.stop - 1 - left)
        if isinstance(rows, range):
            first, last = rows.start - top, rows.stop - 1 - top
            begin, end = offset + first * width + ends[0], offset + last * width + ends[1]
            return range(begin // share, end // share + 1)
        begins, lasts = ((offset + (rows - top) * width + col) // share for col in ends)
        changes = np.bincount(begins, minlength=self.dp + 1)
        changes -= np.bincount(lasts + 1, minlength=self.dp + 1)
        return np.flatnonzero(np.cumsum(changes)).tolist()

    def _placed(self, name: str) -> tuple[int, int]:
        """For ZeRO 1, 2 and 3: where a slice begins in what is cut, and a rank's share of that."""
        if self.zero_stage < 3:
            return self._flat[name]
        return 0, -(-self.plan[name].slice_numel(self.tp) // self.dp)

    def _slice_cols(self, name: str) -> int:
        return self.plan[name].slice_shape(self.tp)[1]

    def _origin(self, name: str, rank: int) -> tuple[int, int]:
        return self.plan[name].slice_origin(self.tp, rank % self.tp)

    def _slice(self, name: str, tp_rank: int) -> Block:
        rows, cols = self.plan[name].slice_shape(self.tp)
        whole = Block(range(rows), range(cols)).shifted(*self._origin(name, tp_rank))
        return self._clip(name, whole)

    def _clip(self, name: str, block: Block) -> Block:
        """Without the padding of the vocabulary, which belongs to no logical tensor."""
        return Block(overlap(block.rows, range(self.plan[name].rows)), block.cols)

    @cached_property
    def _flat(self) -> dict[str, tuple[int, int]]:
        """For ZeRO 1 and 2: the offset of each slice in its flat group, and a rank's share."""
        table: dict[str, tuple[int, int]] = {}
        for group in self.groups:
            offsets, total = [], 0
            for name in group:
                offsets.append(total)
                total += self.plan[name].slice_numel(self.tp)
            # DeepSpeed pads a group to two elements per rank (its all-gather's alignment).
            share = pad(total, 2 * self.dp) // self.dp
            table |= {name: (offset, share) for name, offset in zip(group, offsets, strict=True)}
        return table
