"""Where the numbers of a growth between files come from: any rectangle of any tensor, by `pread`.

Whatever the files' layout, the reader sees whole logical tensors, and holds what it asked for.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.files import shard_name
from megagrow.checkpoint.manifest import read_manifest
from megagrow.checkpoint.shards import Places, shard_tensors
from megagrow.checkpoint.tensor_file import Stored, read_elements, read_header
from megagrow.common.checksums import Files
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.parallel.sharding import STATE_KINDS, StateKind
from megagrow.reshard.layout import Block, Layout

_ELEMENTS_AT_ONCE = 2**20
"""Of the rows that are read at once where only some of their columns are wanted."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """A model on the disk, and its optimizer's state where that was kept."""

    path: Path
    model: ModelConfig
    layout: Layout
    files: tuple[Path, ...]
    """All files that it consists of."""
    kinds: tuple[StateKind, ...] = STATE_KINDS
    adam_step: int = 0
    run: dict[str, Any] | None = None
    """Where its run stood; None if it comes from no run."""
    environment: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def read(self, name: str, kind: StateKind, block: Block) -> Tensor:
        """A rectangle of a logical tensor: (rows, columns) fp32. InputError if a file is cut."""


class PlacedSource(Source):
    """A source in whose files all that a rank holds of a tensor stands in one place."""

    @abstractmethod
    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        """The file, and the place in it, of what a rank of the layout holds."""

    def read(self, name: str, kind: StateKind, block: Block) -> Tensor:
        values = torch.empty(len(block.rows), len(block.cols))
        for rank, part in self.layout.holders(name, block, near=0):
            offset, stride = self.layout.local(name, rank, part)
            read_rows(*self.place(rank, name, kind), offset, stride, inside(values, block, part))
        return values


def inside(values: Tensor, block: Block, part: Block) -> Tensor:
    """The part of a block within the block's values: a view."""
    rows, cols = part.shifted(-block.rows.start, -block.cols.start)
    return values[rows.start : rows.stop, cols.start : cols.stop]


def read_rows(path: Path, stored: Stored, offset: int, stride: int, into: Tensor) -> None:
    """Fills (rows, columns) with the elements of a stored tensor from `offset` on, whose rows are
    `stride` elements apart."""
    at_once = max(1, _ELEMENTS_AT_ONCE // stride)
    for first in range(0, len(into), at_once):
        rows = into[first : first + at_once]
        begin = offset + first * stride
        span = range(begin, begin + (len(rows) - 1) * stride + rows.shape[1])
        read = read_elements(path, stored, span)
        rows.copy_(read.as_strided(tuple(rows.shape), (stride, 1)))


@dataclass(frozen=True, eq=False, kw_only=True)
class CheckpointSource(PlacedSource):
    """A checkpoint of megagrow, in the layout in which it was written."""

    places: Places

    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        shape = (len(self.layout.interval(name, rank // self.layout.tp)),)
        stored = Stored("F32", shape, self.places.begin(rank, name, kind))
        return self.path / shard_name(rank), stored


def open_checkpoint(path: Path) -> CheckpointSource:
    """A checkpoint directory. InputError if it is not whole, its files' headers included."""
    manifest = read_manifest(path)
    layout = manifest.read_layout()
    places = Places(layout, lambda rank: _checked_header(path, layout, rank, manifest.files))
    return CheckpointSource(
        path=path,
        model=ModelConfig(**manifest.model),
        layout=layout,
        files=tuple(path / name for name in sorted(manifest.files)),
        adam_step=manifest.adam_step,
        run=manifest.run,
        environment=manifest.environment,
        places=places,
    )


def _checked_header(path: Path, layout: Layout, rank: int, files: Files) -> dict[str, Stored]:
    wanted = shard_tensors(layout, rank)
    if not wanted:
        return {}
    name = shard_name(rank)
    if name not in files:
        raise CheckpointError(f"{path}: its manifest names no {name}; use another checkpoint")
    found = read_header(path / name)
    for tensor, stored in wanted.items():
        if tensor not in found:
            raise CheckpointError(f"{path / name}: holds no {tensor}; use another checkpoint")
        if found[tensor][:2] != stored[:2]:
            raise CheckpointError(
                f"{path / name}: {tensor} is {found[tensor].dtype} {list(found[tensor].shape)}, "
                f"not {stored.dtype} {list(stored.shape)}; use another checkpoint"
            )
    return found
