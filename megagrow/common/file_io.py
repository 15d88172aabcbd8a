"""Reading and writing byte ranges of files."""

import os
from pathlib import Path

import torch
from torch import Tensor

from megagrow.errors import CheckpointError


def read_bytes(path: Path, into: Tensor, offset: int) -> None:
    """Fill a 1-D uint8 tensor from the bytes of a file that start at `offset`.

    Raises:
        CheckpointError: the file is too short or cannot be read.
    """
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
    """Write all of `data` at a byte offset of an open file. Raises OSError."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def raw_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without a copy."""
    return values.flatten().view(torch.uint8).numpy().data
