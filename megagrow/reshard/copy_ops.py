"""Read and write the blocks of a copy in a rank's stored fragments."""

import torch
from torch import Tensor

from megagrow.growth.map import Axis, Indices
from megagrow.parallel.sharding import Storage
from megagrow.reshard.copy_plan import Copy
from megagrow.reshard.index_ranges import as_array, bounds, moved, pick
from megagrow.reshard.layout import Block, Layout
from megagrow.reshard.transfers import TransferChunk

ELEMENTS_AT_ONCE = 2**18
"""Elements indexed, scaled or drawn per step; few enough to stay in a core's cache."""


def block_view(stored: Tensor, block: Block, offset: int, stride: int) -> Tensor:
    """Return a view (rows, columns) of a stored interval, located by `Layout.local`."""
    shape = (len(block.rows), len(block.cols))
    return stored.as_strided(shape, (stride, 1), stored.storage_offset() + offset)


def take(copy: Copy, rows: range, block: Tensor) -> Tensor:
    """Select rows of the block held by a copy's source.

    Returns (len(rows), columns); a view where the positions are consecutive.
    """
    return _take(_take(block, 0, pick(copy.take_rows, rows)), 1, copy.take_cols)


def write_rows(copy: Copy, rows: range, values: Tensor, layout: Layout, storage: Storage) -> None:
    """Store received rows in the target, scaled by the growth map."""
    to_rows, to_cols = pick(copy.target_rows, rows), copy.target_cols
    values = scaled(values, copy.term.rows, copy.term.cols, to_rows, to_cols)
    block = Block(bounds(to_rows), bounds(to_cols))
    place = layout.local(copy.name, copy.target_rank, block)
    view = block_view(storage[copy.name][copy.kind], block, *place)
    if view.shape == values.shape:
        view.add_(values.to(view.device)) if copy.adds else view.copy_(values)
        return
    inside = (
        _tensor(moved(to_rows, -block.rows.start), view.device)[:, None],
        _tensor(moved(to_cols, -block.cols.start), view.device),
    )
    values = values.to(view.device)
    view[inside] = view[inside] + values if copy.adds else values


def scaled(values: Tensor, rows: Axis, cols: Axis, at_rows: Indices, at_cols: Indices) -> Tensor:
    """Multiply values at these target positions by both axes' scales, in the dtype of `values`."""
    for axis, positions, shape in ((rows, at_rows, (-1, 1)), (cols, at_cols, (1, -1))):
        if axis.scale is not None:
            factors = values.new_tensor(axis.scale[as_array(positions)])
            values = values * factors.view(shape)
    return values


def move_within(copy: Copy, source: Layout, stored: Storage, target: Layout, into: Storage) -> None:
    """Execute a copy within one rank."""
    name = copy.term.source
    place = source.local(name, copy.source_rank, copy.source)
    deliver(copy, block_view(stored[name][copy.read_kind], copy.source, *place), target, into)


def deliver(copy: Copy, block: Tensor, layout: Layout, storage: Storage) -> None:
    """Execute a copy from its source block, using little extra memory."""
    rows, cols = copy.shape
    plain = isinstance(copy.take_rows, range) and isinstance(copy.take_cols, range)
    unscaled = copy.term.rows.scale is None and copy.term.cols.scale is None
    at_once = rows if plain and unscaled else max(1, ELEMENTS_AT_ONCE // cols)
    for first in range(0, rows, at_once):
        part = range(first, min(first + at_once, rows))
        write_rows(copy, part, take(copy, part, block), layout, storage)


def collect(chunk: TransferChunk, buffer: Tensor, layout: Layout, storage: Storage) -> None:
    """Read the elements of a chunk from this rank's storage into a buffer of its shape."""
    transfer = chunk.transfer
    rows, cols = pick(transfer.rows, chunk.rows), transfer.cols
    block = Block(bounds(rows), bounds(cols))
    place = layout.local(transfer.name, transfer.source_rank, block)
    view = block_view(storage[transfer.name][transfer.kind], block, *place)
    at_once = len(rows)
    if not (isinstance(rows, range) and isinstance(cols, range)):
        at_once = max(1, ELEMENTS_AT_ONCE // len(cols))
    for first in range(0, len(rows), at_once):
        part = pick(rows, range(first, first + at_once))
        picked = _take(view, 0, moved(part, -block.rows.start))
        picked = _take(picked, 1, moved(cols, -block.cols.start))
        buffer[first : first + len(part)].copy_(picked)


def _take(block: Tensor, axis: int, positions: Indices) -> Tensor:
    if isinstance(positions, range):
        return block.narrow(axis, positions.start, len(positions))
    return block.index_select(axis, _tensor(positions, block.device))


def _tensor(positions: Indices, device: torch.device) -> Tensor:
    return torch.from_numpy(as_array(positions)).to(device)
