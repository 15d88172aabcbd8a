"""Layout of a sharded state: the range of each parameter on each rank. Pure arithmetic, no tensors.

ZeRO assigns each rank one contiguous interval of a parameter's flattened tensor-parallel slice. An
interval of a row-major matrix is at most three blocks (the end of a row, full rows, the start of a
row), so all later steps operate on rectangles.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from megagrow.config.schema import StageConfig
from megagrow.growth.map import Indices
from megagrow.parallel.engine_config import parameter_groups
from megagrow.parallel.optimizers.rules import ParamScale, matrix_rule
from megagrow.parallel.pipeline.split import pipeline_split
from megagrow.parallel.sharding import Partition, parameter_plan
from megagrow.reshard.index_ranges import bounds, overlap, pick, select, shift


class Block(NamedTuple):
    """Rectangle of a parameter: ranges of rows and columns."""

    rows: range
    cols: range

    def shifted(self, rows: int, cols: int) -> "Block":
        """Return the rectangle shifted by rows and columns."""
        return Block(shift(self.rows, rows), shift(self.cols, cols))

    def within(self, other: "Block") -> "Block":
        """Return the intersection of two rectangles; falsy if disjoint."""
        return Block(overlap(self.rows, other.rows), overlap(self.cols, other.cols))

    def __bool__(self) -> bool:
        return bool(self.rows) and bool(self.cols)


def blocks_of(interval: range, cols: int) -> Iterator[Block]:
    """Yield the rectangles of an interval of a flattened matrix with `cols` columns, in order."""
    position = interval.start
    while position < interval.stop:
        row, col = divmod(position, cols)
        full_rows = (interval.stop - position) // cols if col == 0 else 0
        if full_rows:
            yield Block(range(row, row + full_rows), range(cols))
            position += full_rows * cols
        else:
            end = min(cols, col + interval.stop - position)
            yield Block(range(row, row + 1), range(col, end))
            position += end - col


class Layout(Partition):
    """Partition of a model's state as rectangles of the logical tensors."""

    def blocks(self, name: str, rank: int) -> Iterator[Block]:
        """Yield the rectangles of the logical tensor that a rank holds, in storage order."""
        for block in blocks_of(self.interval(name, rank), self._slice_cols(name)):
            clipped = self._clip(name, block.shifted(*self._origin(name, rank)))
            if clipped:
                yield clipped

    def local(self, name: str, rank: int, block: Block) -> tuple[int, int]:
        """Return (offset, row stride) of a logical block within the rank's stored interval."""
        row, col = self._origin(name, rank)
        cols = self._slice_cols(name)
        first = (block.rows.start - row) * cols + block.cols.start - col
        return first - self.interval(name, rank).start, cols

    def parts(self, name: str, rank: int, wanted: Block) -> Iterator[Block]:
        """Yield the rectangles of a logical block that a rank holds, in storage order."""
        for block in self.blocks(name, rank):
            part = block.within(wanted)
            if part:
                yield part

    def holders(self, name: str, wanted: Block, near: int) -> Iterator[tuple[int, Block]]:
        """Yield (rank, part) of a logical block: disjoint parts that cover it.

        For replicated values, `near` reads from itself if it holds them, else from the replica that
        serves it, chosen to balance the load.
        """
        for tp_rank in range(self.tp):
            for dp_rank in self._dp_ranks(name, tp_rank, wanted.rows, wanted.cols):
                rank = self._rank(name, dp_rank, tp_rank)
                if self.serves(name, rank, near):
                    yield from ((rank, part) for part in self.parts(name, rank, wanted))

    def serves(self, name: str, rank: int, near: int) -> bool:
        """Return True if `near` reads a parameter from `rank` rather than from another replica."""
        if self.plan[name].tp_dim is None and rank % self.tp != near % self.tp:
            return False
        return self.zero_stage > 0 or (rank // self.tp - near // self.tp) % self.dp == 0

    def touched(self, name: str, rows: Indices, cols: Indices) -> list[int]:
        """Return all ranks that hold any of these rows and columns, replicas included.

        With scattered columns, ranks that hold only columns in between are included.
        """
        return [
            self._rank(name, dp_rank, tp_rank)
            for tp_rank in range(self.tp)
            for dp_rank in self._dp_ranks(name, tp_rank, rows, bounds(cols))
        ]

    def writes(self, name: str, rank: int) -> bool:
        """Return True if `rank` is the replica that saves its part of a parameter."""
        first_dp = self.zero_stage > 0 or rank // self.tp % self.dp == 0
        return first_dp and (self.plan[name].tp_dim is not None or rank % self.tp == 0)

    def _dp_ranks(self, name: str, tp_rank: int, rows: Indices, cols: range) -> Iterable[int]:
        """Return the data-parallel ranks that hold any of these rows and columns of a slice."""
        mine = self._slice(name, tp_rank)
        rows, cols = pick(rows, select(rows, mine.rows)[1]), overlap(cols, mine.cols)
        if not len(rows) or not cols:
            return range(0)
        if self.zero_stage == 0:
            return range(self.dp)
        top, left = self.plan[name].slice_origin(self.tp, tp_rank)
        width = self._slice_cols(name)
        offset, share = self.placed(name)
        ends = (cols.start - left, cols.stop - 1 - left)
        if isinstance(rows, range):
            first, last = rows.start - top, rows.stop - 1 - top
            begin, end = offset + first * width + ends[0], offset + last * width + ends[1]
            return range(begin // share, end // share + 1)
        begins, lasts = ((offset + (rows - top) * width + col) // share for col in ends)
        changes = np.bincount(begins, minlength=self.dp + 1)
        changes -= np.bincount(lasts + 1, minlength=self.dp + 1)
        return np.flatnonzero(np.cumsum(changes)).tolist()

    def _rank(self, name: str, dp_rank: int, tp_rank: int) -> int:
        return (self.pipeline_rank(name) * self.dp + dp_rank) * self.tp + tp_rank

    def _slice_cols(self, name: str) -> int:
        return self.plan[name].slice_shape(self.tp)[1]

    def _origin(self, name: str, rank: int) -> tuple[int, int]:
        return self.plan[name].slice_origin(self.tp, rank % self.tp)

    def _slice(self, name: str, tp_rank: int) -> Block:
        rows, cols = self.plan[name].slice_shape(self.tp)
        full = Block(range(rows), range(cols)).shifted(*self._origin(name, tp_rank))
        return self._clip(name, full)

    def _clip(self, name: str, block: Block) -> Block:
        """Remove the vocabulary padding, which is not part of the logical tensor."""
        return Block(overlap(block.rows, range(self.plan[name].rows)), block.cols)


def layout_of(stage: StageConfig, world_size: int, scales: Mapping[str, ParamScale]) -> Layout:
    """Return the layout of a stage whose parameters have these hyper-parameter factors."""
    parallel = stage.parallel
    tp = parallel.tensor_model_parallel_size
    plan = parameter_plan(stage.model, tp, matrix_rule(stage.optimizer))
    groups = tuple(group.names for group in parameter_groups(plan, stage.optimizer, scales))
    split = pipeline_split(stage.model, parallel) if parallel.is_pipeline else None
    return Layout(plan, groups, parallel.zero_stage, parallel.partition_size(world_size), tp, split)
