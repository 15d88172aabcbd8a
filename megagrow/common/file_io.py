"""Read, write and sync bytes of files."""

import os
from pathlib import Path

import torch
from torch import Tensor

from megagrow.errors import CheckpointError


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: Path, into: Tensor, offset: int) -> None:
    """Fills a 1-D uint8 tensor from the file. InputError if the file ends before or fails."""
    view = raw_bytes(into)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise CheckpointError(
                        f"{path}: ends before byte {offset + len(view)}; truncated"
                    )
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def write_bytes(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at a byte of an open file. OSError if it cannot."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def raw_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return values.flatten().view(torch.uint8).numpy().data
