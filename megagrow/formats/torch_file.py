"""torch.save files, read safely and without loading tensors, and written in a stream.

Reading uses torch.load with `weights_only`, so a file cannot run code. The file is mapped, without
reading the pages of tensors, to locate each tensor; values are then read by `pread`, because pages
of a mapped file count as resident memory. Writing produces files that torch.load reads, one piece
of a tensor at a time.
"""

import os
import pickle
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megagrow.checkpoint.tensor_file import DTYPES, Stored
from megagrow.common.file_io import raw_bytes
from megagrow.errors import CheckpointError, ResourceError

NAMES = {dtype: name for name, dtype in DTYPES.items()}

_DAMAGE = (
    *(UnpicklingError, BadZipFile, struct.error, EOFError, RuntimeError, ValueError, TypeError),
    *(LookupError, ArithmeticError, AttributeError, AssertionError, MemoryError),
)
"""Exceptions of torch.load for damaged files and disallowed content."""


class Unread:
    """Placeholder for an object of another program's class, which is not imported."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_torch_file(path: Path, unread: tuple[str, ...] = ()) -> Any:
    """Return a file's content with a `Stored` for each tensor: values, dicts, lists, Namespaces.

    Objects of classes whose full names start with one of `unread` become `Unread`. Raises
    CheckpointError if the file cannot be read, or refers to any class or function other than
    argparse.Namespace.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a complete torch.save file (format of torch 1.6 or newer)"
        )
    try:
        _check_records(path)
        with safe_globals([Namespace]):
            foreign = get_unsafe_globals_in_checkpoint(path)
        if refused := sorted(name for name in foreign if not name.startswith(unread)):
            raise CheckpointError(
                f"{path}: refused, it refers to {', '.join(refused)}, which could run code; only "
                "tensors and plain values are supported"
            )
        with safe_globals([Namespace, *((Unread, name) for name in foreign)]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _placed(loaded, _file_shift(loaded))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGE as error:
        # torch's own message is advice on loading trusted files, its context is the cause.
        cause = repr(error.__context__ or error).splitlines()[0]
        raise CheckpointError(f"{path}: refused, it is damaged ({cause})") from error


def _check_records(path: Path) -> None:
    """Check that tensors are stored uncompressed and little-endian."""
    with ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed")
            if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                raise ValueError("its tensors are big-endian")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _file_shift(loaded: Any) -> int:
    """Return the difference between file offset and address of mapped tensors."""
    addresses = (tensor.data_ptr() for tensor in _tensors(loaded) if tensor.numel())
    address = next(addresses, None)
    if address is None:
        return 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, offset, *_ = line.split()
        start, stop = (int(text, 16) for text in span.split("-"))
        if start <= address < stop:
            return int(offset, 16) - start
    raise ValueError("a tensor is not stored in the file")


def _placed(value: Any, shift: int) -> Any:
    if isinstance(value, Tensor):
        dtype = NAMES.get(value.dtype, str(value.dtype))
        if not value.is_contiguous():
            dtype += ", not contiguous"
        return Stored(dtype, tuple(value.shape), value.data_ptr() + shift if value.numel() else 0)
    if isinstance(value, dict):
        return {key: _placed(item, shift) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(item, shift) for item in value]
    return value


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
