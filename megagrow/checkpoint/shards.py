"""Contents of shard files: the tensors of each rank's file and their positions."""

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from torch import Tensor

from megagrow.checkpoint.tensor_file import Planned, Stored, planned, raw_bytes, write_bytes
from megagrow.common.checksums import FileRecord
from megagrow.parallel.sharding import STATE_KINDS, StateKind, Storage
from megagrow.reshard.layout import Layout


class ShardTensor(NamedTuple):
    """One state of one parameter on one rank: a tensor of the rank's file."""

    rank: int
    name: str
    kind: StateKind

    @property
    def tensor(self) -> str:
        """Name in the file."""
        return f"{self.name}.{self.kind}"


def units(layout: Layout) -> Iterator[ShardTensor]:
    """Yield all tensors of all files, grouped by parameter so that data read for one rank can
    serve the next."""
    for name in layout.plan:
        for kind in layout.plan[name].kinds:
            for rank in range(layout.world_size):
                if holds(layout, name, rank):
                    yield ShardTensor(rank, name, kind)


def holds(layout: Layout, name: str, rank: int) -> bool:
    """Return True if a parameter is in the file of a rank."""
    return layout.writes(name, rank) and bool(layout.interval(name, rank))


def shard_tensors(layout: Layout, rank: int) -> dict[str, Stored]:
    """Return the tensors of a rank's file: fp32, flat."""
    return {
        f"{name}.{kind}": Stored("F32", (len(layout.interval(name, rank)),))
        for name in layout.plan
        if holds(layout, name, rank)
        for kind in layout.plan[name].kinds
    }


class Places:
    """Start offsets of tensors, one integer each, as there may be half a million.

    Args:
        layout: layout of the files.
        tensors: returns the tensors of a rank's file by name; called once per rank.
    """

    def __init__(self, layout: Layout, tensors: Callable[[int], Mapping[str, Stored]]) -> None:
        self._ranks, self._tensors = layout.world_size, tensors
        self._index = {name: index for index, name in enumerate(layout.plan)}
        self._begins: dict[int, np.ndarray] = {}

    def read_all(self) -> None:
        """Read the offsets of all ranks, instead of when they are needed."""
        # One rank after the other: a manifest may list more tensors than fit in memory,
        # but not more files than there are.
        for rank in range(self._ranks):
            self._of_rank(rank)

    def begin(self, rank: int, name: str, kind: StateKind) -> int:
        """Return the first byte of a tensor."""
        return int(self._of_rank(rank)[self._index[name], STATE_KINDS.index(kind)])

    def _of_rank(self, rank: int) -> np.ndarray:
        if rank not in self._begins:
            self._begins[rank] = self._offsets(self._tensors(rank))
        return self._begins[rank]

    def _offsets(self, found: Mapping[str, Stored]) -> np.ndarray:
        begins = np.full((len(self._index), len(STATE_KINDS)), -1, np.int64)
        for name, index in self._index.items():
            for which, kind in enumerate(STATE_KINDS):
                if f"{name}.{kind}" in found:
                    begins[index, which] = found[f"{name}.{kind}"].begin
        return begins


_WRITE_BYTES = 2**20
"""Bytes hashed and written at a time, so that the second access hits the cache."""


def own_tensors(layout: Layout, storage: Storage, rank: int) -> dict[str, Tensor]:
    """Return the tensors that a rank writes: 1-D fp32 views, by name in the file."""
    return {
        f"{name}.{kind}": tensor
        for name, kinds in storage.items()
        if layout.writes(name, rank)
        for kind, tensor in kinds.items()
    }


def planned_shard(tensors: Mapping[str, Tensor]) -> Planned:
    """Plan the safetensors file of these fp32 tensors."""
    return planned({name: Stored("F32", tuple(tensor.shape)) for name, tensor in tensors.items()})


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write and sync a safetensors file. Raises OSError on failure."""
    file, checksum, offset = planned_shard(tensors), xxhash.xxh3_64(), 0
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        parts = (raw_bytes(tensors[name].cpu()) for name in file.tensors)
        for rest in chain([memoryview(file.header)], parts):
            while rest:
                part, rest = rest[:_WRITE_BYTES], rest[_WRITE_BYTES:]
                checksum.update(part)
                write_bytes(descriptor, part, offset)
                offset += len(part)
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    return FileRecord(offset, checksum.hexdigest())
