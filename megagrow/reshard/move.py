"""Reading and writing the blocks of a copy in a rank's stored fragments."""

import numpy as np
import torch
from torch import Tensor

from megagrow.growth.map import Indices
from megagrow.parallel.zero import Storage
from megagrow.reshard.layout import Block, Layout
from megagrow.reshard.plan import Copy, scaled


def block_view(stored: Tensor, block: Block, offset: int, stride: int) -> Tensor:
    """A block (rows, columns) within a stored interval, as `Layout.local` places it."""
    shape = (len(block.rows), len(block.cols))
    return stored.as_strided(shape, (stride, 1), stored.storage_offset() + offset)


def take(copy: Copy, rows: range, block: Tensor) -> Tensor:
    """Of the block that a copy's source holds, some of the rows that it takes.

    (len(rows), columns); a view where the positions are consecutive.
    """
    return _take(_take(block, 0, copy.take_rows[rows.start : rows.stop]), 1, copy.take_cols)


def read_rows(copy: Copy, rows: range, layout: Layout, storage: Storage) -> Tensor:
    """Some rows of what a copy takes from its source rank, read from that rank's storage."""
    name = copy.term.source
    place = layout.local(name, copy.source_rank, copy.source)
    return take(copy, rows, block_view(storage[name][copy.kind], copy.source, *place))


def write_rows(copy: Copy, rows: range, values: Tensor, layout: Layout, storage: Storage) -> None:
    """Stores received rows at their place in the target, scaled as the growth map says."""
    to_rows = copy.target_rows[rows.start : rows.stop]
    values = scaled(values, copy.term.rows, copy.term.cols, to_rows, copy.target_cols)
    block = Block(_bounds(to_rows), _bounds(copy.target_cols))
    place = layout.local(copy.name, copy.target_rank, block)
    view = block_view(storage[copy.name][copy.kind], block, *place)
    if view.shape == values.shape:
        view.add_(values) if copy.adds else view.copy_(values)
        return
    inside = (
        _positions(to_rows, block.rows.start)[:, None],
        _positions(copy.target_cols, block.cols.start),
    )
    view[inside] = view[inside] + values if copy.adds else values


def _take(block: Tensor, axis: int, positions: Indices) -> Tensor:
    if isinstance(positions, range):
        return block.narrow(axis, positions.start, len(positions))
    return block.index_select(axis, torch.from_numpy(positions).to(block.device))


def _bounds(positions: Indices) -> range:
    if isinstance(positions, range):
        return positions
    return range(int(positions[0]), int(positions[-1]) + 1)


def _positions(positions: Indices, first: int) -> Tensor:
    return torch.from_numpy(np.asarray(positions) - first)
