"""Layout: who holds which part of which parameter. Pure arithmetic, no tensors.

ZeRO always gives a rank one contiguous interval of a parameter's flattened tensor-parallel slice.
An interval of a matrix stored by rows is at most three blocks (the end of a row, whole rows, the
beginning of a row), so everything that follows is about rectangles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megagrow.parallel.plan import ParamSpec, pad


class Block(NamedTuple):
    """A rectangle of a parameter, by its rows and columns."""

    rows: range
    cols: range

    def shifted(self, rows: int, cols: int) -> "Block":
        """The same rectangle seen from another origin."""
        return Block(shift(self.rows, rows), shift(self.cols, cols))

    def __bool__(self) -> bool:
        return bool(self.rows) and bool(self.cols)


def shift(span: range, by: int) -> range:
    """A range moved by a distance."""
    return range(span.start + by, span.stop + by)


def overlap(a: range, b: range) -> range:
    """What two ranges share; empty where they do not meet."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


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
        offset, share = 0, -(-numel // self.dp)
        if self.zero_stage < 3:
            offset, share = self._flat[name]
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

    def holders(self, name: str, wanted: Block, near: int) -> Iterator[tuple[int, Block]]:
        """Which ranks hold a logical block, and which part each: disjoint parts that cover it.

        Where several ranks hold the same numbers, `near` gets them from itself if it can, else
        from a replica chosen so that the load is spread.
        """
        tp_ranks = range(self.tp)
        if self.plan[name].tp_dim is None:
            tp_ranks = range(near % self.tp, near % self.tp + 1)
        for tp_rank in tp_ranks:
            origin = self._origin(name, tp_rank)
            inside = Block(
                *(overlap(a, b) for a, b in zip(wanted, self._slice(name, tp_rank), strict=True))
            )
            if not inside:
                continue
            local = inside.shifted(-origin[0], -origin[1])
            for dp_rank in self._dp_holders(name, local, near // self.tp):
                for held in blocks_of(self.interval(name, dp_rank), self._slice_cols(name)):
                    part = Block(*(overlap(a, b) for a, b in zip(local, held, strict=True)))
                    if part:
                        yield dp_rank * self.tp + tp_rank, part.shifted(*origin)

    def writes(self, name: str, rank: int) -> bool:
        """Whether `rank` is the one that saves what it holds, where several hold the same."""
        first_dp = self.zero_stage > 0 or rank < self.tp
        return first_dp and (self.plan[name].tp_dim is not None or rank % self.tp == 0)

    def _dp_holders(self, name: str, local: Block, near_dp: int) -> range:
        if self.zero_stage == 0:
            return range(near_dp % self.dp, near_dp % self.dp + 1)
        cols = self._slice_cols(name)
        first = local.rows.start * cols + local.cols.start
        last = (local.rows.stop - 1) * cols + local.cols.stop - 1
        offset, share = 0, -(-self.plan[name].slice_numel(self.tp) // self.dp)
        if self.zero_stage < 3:
            offset, share = self._flat[name]
        return range((offset + first) // share, (offset + last) // share + 1)

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
