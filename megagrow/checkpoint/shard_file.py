"""The file of one rank, written in one go, its checksum taken on the way to the disk."""

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import xxhash
from torch import Tensor

from megagrow.checkpoint.tensor_file import Planned, Stored, planned
from megagrow.common.checksums import FileRecord
from megagrow.common.file_io import raw_bytes, write_bytes
from megagrow.parallel.engine import Storage
from megagrow.reshard.layout import Layout

_WRITE_BYTES = 2**20
"""What is hashed and written at once: it is still in the processor's cache the second time."""


def own_tensors(layout: Layout, storage: Storage, rank: int) -> dict[str, Tensor]:
    """What a rank writes of what it holds: 1-D fp32, not copied, by their names in the file."""
    return {
        f"{name}.{kind}": tensor
        for name, kinds in storage.items()
        if layout.writes(name, rank)
        for kind, tensor in kinds.items()
    }


def planned_shard(tensors: Mapping[str, Tensor]) -> Planned:
    """The safetensors file of these tensors, all fp32."""
    return planned({name: Stored("F32", tuple(tensor.shape)) for name, tensor in tensors.items()})


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes a safetensors file and waits until it is on the disk. OSError if it cannot be."""
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
