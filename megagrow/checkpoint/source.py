"""Sources of weights on disk: any rectangle of any tensor, read by `pread`.

Mapped pages count as resident memory; `pread` into buffers keeps memory bounded.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.discovery import shard_name
from megagrow.checkpoint.manifest import parse_manifest, read_manifest
from megagrow.checkpoint.shards import Places, shard_tensors
from megagrow.checkpoint.tensor_file import Stored, read_elements, read_header
from megagrow.common.checksums import Files
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.parallel.sharding import ADAMW_KINDS, StateKind, kinds_in
from megagrow.reshard.layout import Block, Layout

_ELEMENTS_AT_ONCE = 2**20
"""Elements read at a time where only some columns of rows are needed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """Model on disk, with its optimizer state if present."""

    path: Path
    model: ModelConfig
    layout: Layout
    files: tuple[Path, ...]
    """All files of the source."""
    kinds: tuple[StateKind, ...] = ADAMW_KINDS
    """States in the files; a parameter has those of them that its optimizer has."""
    adam_step: int = 0
    run: dict[str, Any] | None = None
    """Position of its run; None if it belongs to no run."""
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    """One line for each content of the files that is read differently or not at all."""

    def kinds_of(self, name: str) -> tuple[StateKind, ...]:
        """Return the states of a parameter."""
        return tuple(kind for kind in self.layout.plan[name].kinds if kind in self.kinds)

    @abstractmethod
    def read(self, name: str, kind: StateKind, block: Block) -> Tensor:
        """Read a rectangle of a logical tensor: (rows, columns) fp32. Raises CheckpointError if
        truncated."""


class PlacedSource(Source):
    """Source in whose files each rank's part of a tensor is contiguous."""

    @abstractmethod
    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        """Return the file and location of a rank's part of a tensor."""

    def read(self, name: str, kind: StateKind, block: Block) -> Tensor:
        values = torch.empty(len(block.rows), len(block.cols))
        for rank, part in self.layout.holders(name, block, near=0):
            offset, stride = self.layout.local(name, rank, part)
            read_rows(*self.place(rank, name, kind), offset, stride, inside(values, block, part))
        return values


def inside(values: Tensor, block: Block, part: Block) -> Tensor:
    """Return a view of a sub-block within the values of a block."""
    rows, cols = part.shifted(-block.rows.start, -block.cols.start)
    return values[rows.start : rows.stop, cols.start : cols.stop]


def read_rows(path: Path, stored: Stored, offset: int, stride: int, into: Tensor) -> None:
    """Fill (rows, columns) with elements of a stored tensor, from `offset` with row stride
    `stride`."""
    at_once = max(1, _ELEMENTS_AT_ONCE // stride)
    for first in range(0, len(into), at_once):
        rows = into[first : first + at_once]
        begin = offset + first * stride
        span = range(begin, begin + (len(rows) - 1) * stride + rows.shape[1])
        read = read_elements(path, stored, span)
        rows.copy_(read.as_strided(tuple(rows.shape), (stride, 1)))


@dataclass(frozen=True, eq=False, kw_only=True)
class CheckpointSource(PlacedSource):
    """Native checkpoint in its stored layout."""

    places: Places

    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        shape = (len(self.layout.interval(name, rank)),)
        stored = Stored("F32", shape, self.places.begin(rank, name, kind))
        return self.path / shard_name(rank), stored


def open_checkpoint(path: Path, verified: bool = False) -> CheckpointSource:
    """Open a checkpoint. Raises CheckpointError if it is incomplete, including its files'
    headers.

    `verified`: its files have been verified. Only the manifest is opened then, and the header of a
    file is read with its first tensor: a rank needs few of the files.
    """
    manifest = parse_manifest(path) if verified else read_manifest(path)
    layout = manifest.read_layout()
    places = Places(layout, lambda rank: _checked_header(path, layout, rank, manifest.files))
    if not verified:
        places.read_all()
    return CheckpointSource(
        path=path,
        model=ModelConfig(**manifest.model),
        layout=layout,
        files=tuple(path / name for name in sorted(manifest.files)),
        kinds=kinds_in(layout.plan),
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
        raise CheckpointError(f"{path}: its manifest does not list {name}; use another checkpoint")
    found = read_header(path / name)
    for tensor, stored in wanted.items():
        if tensor not in found:
            raise CheckpointError(
                f"{path / name}: does not contain {tensor}; use another checkpoint"
            )
        if found[tensor][:2] != stored[:2]:
            raise CheckpointError(
                f"{path / name}: {tensor} is {found[tensor].dtype} {list(found[tensor].shape)}, "
                f"not {stored.dtype} {list(stored.shape)}; use another checkpoint"
            )
    return found
