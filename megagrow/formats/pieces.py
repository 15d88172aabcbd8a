"""A source's tensors, some rows at a time, for writers of other forms."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megagrow.checkpoint.source import Source
from megagrow.growth.map import Kind
from megagrow.reshard.layout import Block

ELEMENTS_AT_ONCE = 2**20
"""Of a tensor that are read and written at once, or one row."""


def row_pieces(source: Source, name: str, kind: Kind, block: Block) -> Iterator[Tensor]:
    """A rectangle of a logical tensor, some rows at a time; zeros where the source has no such
    kind of state."""
    at_once = max(1, ELEMENTS_AT_ONCE // len(block.cols))
    for first in range(block.rows.start, block.rows.stop, at_once):
        some = Block(range(first, min(first + at_once, block.rows.stop)), block.cols)
        if kind in source.kinds:
            yield source.read(name, kind, some)
        else:
            yield torch.zeros(len(some.rows), len(some.cols))
