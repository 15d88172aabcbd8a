"""Files of torch.save, written piece by piece: no tensor is ever whole in memory.

The format: a zip archive, not compressed, of a pickle and of one record of raw numbers for each
tensor, which begins at a multiple of 64 bytes. Checksums are the archive's own.
"""

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

from megagrow.checkpoint.tensor_file import DTYPES
from megagrow.common.file_io import raw_bytes
from megagrow.errors import InputError

_STORAGES = {"F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage}
_FOLDER = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20
"""Bytes of a record's header besides its name and padding; zipfile adds the second part."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """A tensor that is made while it is written: its pieces, in the order of its storage."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


class _Numbers:
    """The storage of a streamed tensor, as the pickle refers to it."""

    def __init__(self, tensor: Streamed) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Writes streamed tensors as torch.save writes tensors, and keeps them in their order."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.found: list[Streamed] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Streamed):
            return NotImplemented
        strides = tuple(prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
        rest: tuple[Any, ...] = (0, value.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, (_Numbers(value), *rest)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Numbers):
            return None
        self.found.append(value.tensor)
        storage = _STORAGES[value.tensor.dtype]
        return ("storage", storage, str(len(self.found) - 1), "cpu", value.tensor.numel)


def write_torch_file(path: Path, value: Any, advance: Callable[[int], None]) -> None:
    """Writes a new file of plain values and streamed tensors, and waits until it is on the disk.

    `advance` is told how many bytes of tensors were written.
    """
    pickled = BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(value)
    with path.open("xb") as file:
        with ZipFile(file, "w") as archive:
            archive.writestr(ZipInfo(f"{_FOLDER}/data.pkl"), pickled.getvalue())
            archive.writestr(ZipInfo(f"{_FOLDER}/byteorder"), b"little")
            for key, tensor in enumerate(pickler.found):
                _write_numbers(archive, file, f"{_FOLDER}/data/{key}", tensor, advance)
            archive.writestr(ZipInfo(f"{_FOLDER}/version"), b"3\n")
        file.flush()
        os.fsync(file.fileno())


def check_torch_file(path: Path) -> None:
    """InputError if what is on the disk is not what was written, by the archive's checksums."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with ZipFile(file) as archive:
            bad = archive.testzip()
    if bad is not None:
        raise InputError(f"{path}: {bad} is not on the disk as it was written; look at the disk")


def _write_numbers(
    archive: ZipFile,
    file: BinaryIO,
    name: str,
    tensor: Streamed,
    advance: Callable[[int], None],
) -> None:
    record = ZipInfo(name)
    begin = file.tell() + _LOCAL_HEADER + len(name) + _ZIP64_EXTRA
    padding = -(begin + 4) % _ALIGNMENT
    record.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    written = 0
    with archive.open(record, "w", force_zip64=True) as numbers:
        for piece in tensor.pieces():
            data = raw_bytes(piece.to(DTYPES[tensor.dtype]))
            numbers.write(data)
            advance(len(data))
            written += len(data)
    if written != tensor.nbytes:
        raise AssertionError(f"{name}: {written} bytes of a tensor of {tensor.nbytes}")
