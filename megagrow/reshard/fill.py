"""Writes numbers that come from no other rank, each rank making only the rows that it holds.

They are drawn, or read from files. Every drawn number depends on its stream and its place in the
logical tensor alone, so that all layouts hold the same bits.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from megagrow.growth.map import GrowthMap, Kind
from megagrow.parallel.engine import Storage
from megagrow.parallel.initialize import initial_rows
from megagrow.reshard.copy_ops import ELEMENTS_AT_ONCE, block_view
from megagrow.reshard.drawn import drawn_rows
from megagrow.reshard.layout import Block, Layout


def fill_initial(layout: Layout, rank: int, storage: Storage, seed: int) -> None:
    """Writes the initial fp32 weights; moments are left at zero, and so is padding."""
    for name in storage:
        draw = partial(initial_rows, layout.plan[name], seed)
        _write(layout, rank, storage[name]["fp32"], name, _columns_of(draw))


def fill_new(growth: GrowthMap, layout: Layout, rank: int, storage: Storage) -> None:
    """Writes the fills of a growth map into the fp32 weights of an empty engine.

    To be called before the exchange, whose copies are added to what is filled. Padding, and what
    no fill speaks of, is left at zero.
    """
    for name in storage:
        fills = [fill for fill in growth.fills.get(name, ()) if not fill.is_zero]
        if fills:
            draw = partial(drawn_rows, fills, layout.plan[name])
            _write(layout, rank, storage[name]["fp32"], name, _columns_of(draw))


def fill_read(
    layout: Layout,
    rank: int,
    storage: Storage,
    kinds: tuple[Kind, ...],
    read: Callable[[str, Kind, Block], Tensor],
) -> None:
    """Writes what `read` gives for the blocks that a rank holds; padding is left at zero."""
    for name, held in storage.items():
        for kind in kinds:
            _write(layout, rank, held[kind], name, partial(read, name, kind))


def _columns_of(draw: Callable[[range], Tensor]) -> Callable[[Block], Tensor]:
    """Of something that makes whole rows: the columns of a block."""
    return lambda block: draw(block.rows)[:, block.cols.start : block.cols.stop]


def _write(
    layout: Layout, rank: int, stored: Tensor, name: str, make: Callable[[Block], Tensor]
) -> None:
    """Writes what `make` gives for the blocks that a rank holds of a parameter, piece by piece."""
    rows_at_once = max(1, ELEMENTS_AT_ONCE // layout.plan[name].cols)
    for block in layout.blocks(name, rank):
        for first in range(block.rows.start, block.rows.stop, rows_at_once):
            part = Block(range(first, min(first + rows_at_once, block.rows.stop)), block.cols)
            place = layout.local(name, rank, part)
            block_view(stored, part, *place).copy_(make(part))
