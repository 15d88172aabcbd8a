"""Safetensors files read and written in pieces: at no time is a whole tensor in memory.

The format: a little-endian u64, the length of the header; the header, JSON with type, shape and
place of each tensor, filled up with spaces to a multiple of 8; the tensors, end to end. What is
written here is byte for byte what safetensors' own `save_file` writes of the same tensors.
Files are read by `pread` and never mapped: pages of a mapped file count as resident memory.
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

from megagrow.common.file_io import read_bytes
from megagrow.common.json_text import parse_json
from megagrow.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that weights may have, by their names in the format."""

_HEADER_LIMIT = 100_000_000
"""Bytes; safetensors itself refuses a longer header."""

_MOST_AXES = 16
"""Of a tensor; the product of more could take long."""


class Stored(NamedTuple):
    """Type and shape of a tensor in a file, and the byte of the file at which it begins."""

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
    """A file that is still to be written: its header, and where everything will be."""

    header: bytes
    tensors: dict[str, Stored]
    size: int


def planned(tensors: Mapping[str, Stored], metadata: dict[str, str] | None = None) -> Planned:
    """The file of these tensors, whose `begin` is not looked at; all of one type."""
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
    """All tensors of a file, those of types that are not read included. InputError if it is no
    safetensors file, or not a whole one: the tensors must lie end to end and fill it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            text = file.read(length)
            entries = parse_json(text) if text.startswith(b"{") else None
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        if not _is_metadata(entries.pop("__metadata__", {})):
            raise ValueError("its metadata are not texts by their names")
        placed = {intern(name): _stored(name, entry) for name, entry in entries.items()}
        _check_end_to_end(placed, size - 8 - length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    return {name: s._replace(begin=s.begin + 8 + length) for name, (s, _) in placed.items()}


def _stored(name: str, entry: Any) -> tuple[Stored, int]:
    """One entry of a header, its `begin` counted from the end of the header, and where it ends."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name[:100]!r} has no type, shape and place")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = [_are_counts(shape, _MOST_AXES), _are_counts(offsets, 2), isinstance(dtype, str)]
    if not all(whole) or len(offsets) < 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name[:100]!r} is of no possible type, shape or place")
    found, held = Stored(dtype, tuple(shape), offsets[0]), offsets[1] - offsets[0]
    if dtype in DTYPES and found.nbytes != held:
        raise ValueError(f"{name[:100]!r}: a tensor of shape {shape} in {held} bytes")
    return found, offsets[1]


def _is_metadata(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(text, str) for text in found.values())


def _are_counts(values: Any, most: int) -> bool:
    """Whether it is a list of at most so many whole numbers, 0 or more, of 64 bits."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_end_to_end(placed: Mapping[str, tuple[Stored, int]], size: int) -> None:
    """ValueError if tensors overlap, leave a hole, or do not end where the file ends."""
    end = 0
    for begin, stop, name in sorted((s.begin, stop, name) for name, (s, stop) in placed.items()):
        if begin != end:
            relation = "overlaps another" if begin < end else "does not begin where another ends"
            raise ValueError(f"{name[:100]!r} {relation}")
        end = stop
    if end != size:
        raise ValueError(f"truncated: {size} bytes of tensors instead of {end}")


def read_elements(path: Path, stored: Stored, elements: range) -> Tensor:
    """Consecutive elements of a tensor in a file: 1-D, in the file's type."""
    size = stored.item_bytes
    raw = torch.empty(len(elements) * size, dtype=torch.uint8)
    read_bytes(path, raw, stored.begin + elements.start * size)
    return raw.view(DTYPES[stored.dtype])
