"""Read and write safetensors files in pieces, without full tensors in memory.

Format: a little-endian u64, the length of the header; the header, JSON with dtype, shape and
offsets of each tensor, padded with spaces to a multiple of 8; the contiguous tensors. Written files
are byte-identical to those of safetensors' `save_file`. Files are read by `pread` and never mapped,
because pages of a mapped file count as resident memory.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagrow.common.json_text import parse_json
from megagrow.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported dtypes by their names in the format."""

_HEADER_LIMIT = 100_000_000
"""Maximum header bytes, as in the safetensors library."""

MOST_TENSORS = 300_000
"""Maximum number of tensors of a file; a rank of 10,000 layers has 270,000."""

MOST_AXES = 16
"""Maximum dimensions of a tensor."""


class Stored(NamedTuple):
    """Dtype, shape and start offset of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class Planned:
    """File to be written: header and tensor positions."""

    header: bytes
    tensors: dict[str, Stored]
    size: int


def planned(tensors: Mapping[str, Stored], metadata: dict[str, str] | None = None) -> Planned:
    """Plan a file of tensors of one dtype; their `begin` is ignored."""
    names = sorted(tensors)
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    begins, offset = {}, 0
    for name in names:
        begins[name] = offset
        stop = offset + tensors[name].nbytes
        entries[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    placed = {name: tensors[name]._replace(begin=first + begins[name]) for name in names}
    return Planned(struct.pack("<Q", len(text)) + text, placed, first + offset)


def read_header(path: Path) -> dict[str, Stored]:
    """Read all tensor entries of a file, including unsupported dtypes.

    Raises CheckpointError if it is not a complete safetensors file: tensors must be contiguous and
    fill it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            text = file.read(length)
            if (count := text.count(b'"data_offsets"')) > MOST_TENSORS:
                raise ValueError(f"{count} tensors, more than the limit of {MOST_TENSORS}")
            entries = parse_json(text, 8 * MOST_TENSORS) if text.startswith(b"{") else None
        if not isinstance(entries, dict):
            raise ValueError("its header is not a JSON object")
        if not _is_metadata(entries.pop("__metadata__", {})):
            raise ValueError("its metadata is not a mapping of strings")
        placed = {intern(name): _stored(name, entry) for name, entry in entries.items()}
        _check_end_to_end(placed, size - 8 - length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
    return {name: s._replace(begin=s.begin + 8 + length) for name, (s, _) in placed.items()}


def _stored(name: str, entry: Any) -> tuple[Stored, int]:
    """Parse a header entry; return it with its end. Offsets are relative to the end of the
    header."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name[:100]!r} has no dtype, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = [_are_counts(shape, MOST_AXES), _are_counts(offsets, 2), isinstance(dtype, str)]
    if not all(whole) or len(offsets) < 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name[:100]!r} has an invalid dtype, shape or offset")
    found, held = Stored(dtype, tuple(shape), offsets[0]), offsets[1] - offsets[0]
    if dtype in DTYPES and found.nbytes != held:
        raise ValueError(f"{name[:100]!r}: a tensor of shape {shape} in {held} bytes")
    return found, offsets[1]


def _is_metadata(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(text, str) for text in found.values())


def _are_counts(values: Any, most: int) -> bool:
    """Return True for a list of at most this many non-negative 64-bit integers."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_end_to_end(placed: Mapping[str, tuple[Stored, int]], size: int) -> None:
    """Raise ValueError if tensors overlap, leave gaps, or do not fill the file."""
    end = 0
    for begin, stop, name in sorted((s.begin, stop, name) for name, (s, stop) in placed.items()):
        if begin != end:
            relation = "overlaps another" if begin < end else "does not start where another ends"
            raise ValueError(f"{name[:100]!r} {relation}")
        end = stop
    if end != size:
        raise ValueError(f"truncated: {size} bytes of tensors instead of {end}")


def read_elements(path: Path, stored: Stored, elements: range) -> Tensor:
    """Read consecutive elements of a tensor: 1-D, in the file's dtype."""
    size = stored.item_bytes
    raw = torch.empty(len(elements) * size, dtype=torch.uint8)
    read_bytes(path, raw, stored.begin + elements.start * size)
    return raw.view(DTYPES[stored.dtype])


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
