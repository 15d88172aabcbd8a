"""Fills an empty engine with initial weights, each rank drawing only what it holds."""

from megagrow.parallel.initialize import initial_rows
from megagrow.parallel.zero import Storage
from megagrow.reshard.layout import Block, Layout
from megagrow.reshard.move import block_view

_ELEMENTS_AT_ONCE = 2**22


def fill_initial(layout: Layout, rank: int, storage: Storage, seed: int) -> None:
    """Writes the initial fp32 weights; moments are left at zero, and so is padding."""
    for name, kinds in storage.items():
        spec = layout.plan[name]
        rows_at_once = max(1, _ELEMENTS_AT_ONCE // spec.cols)
        for block in layout.blocks(name, rank):
            for first in range(block.rows.start, block.rows.stop, rows_at_once):
                part = Block(range(first, min(first + rows_at_once, block.rows.stop)), block.cols)
                values = initial_rows(spec, seed, part.rows)[:, part.cols.start : part.cols.stop]
                place = layout.local(name, rank, part)
                block_view(kinds["fp32"], part, *place).copy_(values)
