"""torch.save files, read safely and without loading tensors, and written in a stream.

Reading interprets the file's pickle as data (`torch_pickle`), so a file cannot run code, and finds
each tensor in the archive; values are then read by `pread`. Writing produces files that torch.load
reads, one piece of a tensor at a time.
"""

import io
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

import torch
from torch import Tensor

from megagrow.checkpoint.tensor_file import DTYPES, raw_bytes
from megagrow.errors import CheckpointError, ResourceError
from megagrow.formats.torch_pickle import RefusedNames, StorageRecord, read_pickle

READ_BYTES = 32_000_000
"""Maximum size of the pickle, and of the archive's directory."""

_DAMAGE = (
    *(BadZipFile, struct.error, EOFError, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, NotImplementedError, RecursionError),
)
"""Exceptions for damaged archives and pickles."""


def read_torch_file(path: Path, unread: tuple[str, ...] = ()) -> Any:
    """Return a file's content with a `Stored` for each tensor: values, dicts, lists, Namespaces.

    Objects of classes whose full names start with one of `unread` become `Unread`. Raises
    CheckpointError if the file cannot be read, or refers to other classes or functions than those
    of tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a complete torch.save file (format of torch 1.6 or newer)"
        )
    try:
        with _LimitedFile(path) as file, ZipFile(file) as archive:
            folder, records = _records(archive, file)
            pickled = archive.read(records[f"{folder}/data.pkl"])

            def record_of(key: str) -> StorageRecord:
                record = records[f"{folder}/data/{key}"]
                return StorageRecord(_data_offset(file, record), record.file_size)

            return read_pickle(pickled, unread, record_of)
    except RefusedNames as error:
        raise CheckpointError(
            f"{path}: refused, it refers to {error}, which could run code; only tensors and plain "
            "values are supported"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: refused, it is damaged ({error!r:.200})") from error


class _LimitedFile(io.FileIO):
    """File whose single reads are limited: zipfile reads the directory of an archive at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes. Raises ValueError beyond the limit."""
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > READ_BYTES:
            raise ValueError(f"its directory is larger than {READ_BYTES} bytes")
        return super().read(size) or b""


def _records(archive: ZipFile, file: BinaryIO | io.FileIO) -> tuple[str, dict[str, ZipInfo]]:
    """Return the folder in the archive and its records by name.

    Raises ValueError unless all are stored uncompressed and little-endian within the file, and the
    pickle is below the limit.
    """
    records = {record.filename: record for record in archive.infolist()}
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(records) != len(archive.infolist()):
        raise ValueError("not one data.pkl, or several records of one name")
    folder = pickles[0].removesuffix("/data.pkl")
    size = os.fstat(file.fileno()).st_size
    for record in records.values():
        if record.compress_type != ZIP_STORED:
            raise ValueError(f"{record.filename} is compressed")
        if record.file_size != record.compress_size or record.file_size > size:
            raise ValueError(f"{record.filename} has {record.file_size} bytes in a file of {size}")
    if records[pickles[0]].file_size > READ_BYTES:
        raise ValueError(f"its pickle is larger than {READ_BYTES} bytes")
    order = records.get(f"{folder}/byteorder")
    if order is not None and (order.file_size > 100 or archive.read(order) != b"little"):
        raise ValueError("its tensors are big-endian")
    return folder, records


def _data_offset(file: io.FileIO, record: ZipInfo) -> int:
    """Return the offset of a record's data, from its local header."""
    file.seek(record.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(_LOCAL_HEADER))
    offset = record.header_offset + _LOCAL_HEADER + name + extra
    if signature != b"PK\3\4" or offset + record.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{record.filename} is outside the file")
    return int(offset)


_STORAGES = {"F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage}


_FOLDER = "archive"


_ALIGNMENT = 64


_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20
"""Bytes of a record's header without name and padding; zipfile adds the second part."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """Tensor produced while it is written: `pieces` yields parts in storage order."""

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
    """Storage of a streamed tensor, referenced by the pickle."""

    def __init__(self, tensor: Streamed) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Pickler that writes streamed tensors like torch.save and records them in order."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Streamed] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Streamed):
            return NotImplemented
        strides = tuple(prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
        rest: tuple[Any, ...] = (0, value.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, (_Numbers(value), *rest)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Numbers):
            return None
        self.tensors.append(value.tensor)
        storage = _STORAGES[value.tensor.dtype]
        return ("storage", storage, str(len(self.tensors) - 1), "cpu", value.tensor.numel)


def write_torch_file(path: Path, value: Any, advance: Callable[[int], None]) -> None:
    """Write and sync a new file of plain values and streamed tensors.

    `advance` is called with the bytes of tensors written.
    """
    pickled = BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(value)
    with path.open("xb") as file:
        with ZipFile(file, "w") as archive:
            archive.writestr(ZipInfo(f"{_FOLDER}/data.pkl"), pickled.getvalue())
            archive.writestr(ZipInfo(f"{_FOLDER}/byteorder"), b"little")
            for key, tensor in enumerate(pickler.tensors):
                _write_numbers(archive, file, f"{_FOLDER}/data/{key}", tensor, advance)
            archive.writestr(ZipInfo(f"{_FOLDER}/version"), b"3\n")
        file.flush()
        os.fsync(file.fileno())


def check_torch_file(path: Path) -> None:
    """Verify the archive's checksums on disk. Raises ResourceError on a mismatch."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with ZipFile(file) as archive:
            bad = archive.testzip()
    if bad is not None:
        raise ResourceError(f"{path}: {bad} has a wrong checksum after writing; check the disk")


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
