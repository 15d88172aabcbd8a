"""Files of torch.save, read without trusting them and without holding their numbers.

torch.load is told `weights_only`: no file decides what code is run. It maps the file, which touches
nothing, and only tells where each tensor stands; numbers are then read by `pread`, since pages of
a mapped file count as resident memory.
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
"""What torch.load raises where a file is none of its own, or holds what it must not."""


class Unread:
    """Stands for an object of another program's class, which is neither imported nor made."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_torch_file(path: Path, unread: tuple[str, ...] = ()) -> Any:
    """What a file holds, with a `Stored` for each tensor: plain values, dicts, lists, Namespaces.

    Objects of classes whose full names begin with one of `unread` become `Unread`. InputError if
    the file can not be read, or names any other class or function but argparse.Namespace.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a whole file of torch.save (in its format since torch 1.6)"
        )
    try:
        _check_records(path)
        with safe_globals([Namespace]):
            foreign = get_unsafe_globals_in_checkpoint(path)
        if refused := sorted(name for name in foreign if not name.startswith(unread)):
            raise CheckpointError(
                f"{path}: refused, it is not only tensors and plain values but names "
                f"{', '.join(refused)}, which could run code"
            )
        with safe_globals([Namespace, *((Unread, name) for name in foreign)]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _placed(loaded, _file_shift(loaded))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGE as error:
        # torch wraps the cause in advice on how to trust a file.
        cause = repr(error.__context__ or error).splitlines()[0]
        raise CheckpointError(f"{path}: refused, it is damaged ({cause})") from error


def _check_records(path: Path) -> None:
    """That numbers stand in the file as they are in memory."""
    with ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed")
            if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                raise ValueError("its numbers are big-endian")


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
    """What is to be added to the address of a mapped number to get its place in the file."""
    addresses = (tensor.data_ptr() for tensor in _tensors(loaded) if tensor.numel())
    address = next(addresses, None)
    if address is None:
        return 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, offset, *_ = line.split()
        start, stop = (int(text, 16) for text in span.split("-"))
        if start <= address < stop:
            return int(offset, 16) - start
    raise ValueError("a tensor that does not stand in the file")


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
        raise ResourceError(f"{path}: {bad} is not on the disk as it was written; look at the disk")


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
