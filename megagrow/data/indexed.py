"""Megatron-LM's indexed format: a tokenized corpus as PREFIX.bin and PREFIX.idx.

PREFIX.bin contains the token ids. PREFIX.idx, little-endian:

    magic b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, sequence count u64, document count u64,
    sequence lengths int32 [sequence count], in tokens,
    sequence pointers int64 [sequence count], in bytes into PREFIX.bin,
    document indices int64 [document count]: 0, then the sequence after each document's last one.

So "document count" is the number of documents plus one. Source: Megatron-LM,
megatron/core/datasets/indexed_dataset.py.
"""

import shutil
import struct
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from megagrow.common.atomic_files import partial_path, publish
from megagrow.errors import DataError, InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODE_OF_DTYPE = {np.dtype(name): code for code, name in DTYPE_OF_CODE.items()}

COPY_BYTES = 1 << 24
SPOT_CHECKS = 1024
"""Sequences whose pointers are checked on opening: all or, in large corpora, a sample."""


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return PREFIX + suffix; unlike Path.with_suffix, keeps dots in the prefix."""
    return prefix.with_name(prefix.name + suffix)


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype Megatron-LM uses for the ids of a vocabulary: uint16 or int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedCorpus:
    """Memory-mapped tokenized corpus, validated on opening without a full scan.

    `tokens` is PREFIX.bin, one-dimensional, of the file's dtype. Raises DataError if a file is
    missing, empty, truncated or contradicts the other.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._idx_path = with_suffix(prefix, ".idx")
        self._bin_path = with_suffix(prefix, ".bin")
        idx_size, bin_size = _size_of(self._idx_path), _size_of(self._bin_path)
        dtype, sequences, entries = self._read_header(idx_size)
        self._lengths, self._pointers, self._documents = self._map_index(sequences, entries)
        self._itemsize = dtype.itemsize
        self._check_ends(bin_size)
        self._check_pointers()
        self.tokens = np.memmap(self._bin_path, dtype=dtype, mode="r")

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return the offsets in [start, stop), in tokens, of document starts: int64, ascending."""
        # bisect rather than np.searchsorted, which copies the array because its offset in the
        # file is not a multiple of 8 bytes.
        first = bisect_left(self._pointers, start * self._itemsize)
        last = bisect_left(self._pointers, stop * self._itemsize)
        low, high = bisect_left(self._documents, first), bisect_left(self._documents, last)
        rows = self._documents[low:high]
        if np.any((rows < first) | (rows >= last)):
            raise self._broken("its document indices are not in ascending order")
        starts: np.ndarray = self._pointers[rows] // self._itemsize
        if np.any((starts < start) | (starts >= stop)):
            raise self._broken("its sequence pointers are not in ascending order")
        return starts

    def _read_header(self, idx_size: int) -> tuple[np.dtype, int, int]:
        """Return the dtype, the number of sequences and the number of document indices."""
        if idx_size < HEADER.size:
            raise self._broken(f"{idx_size} bytes, smaller than its header")
        with self._idx_path.open("rb") as file:
            magic, version, code, sequences, entries = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC or version != VERSION:
            raise self._broken("it is not a Megatron-LM index of version 1")
        dtype = np.dtype(DTYPE_OF_CODE.get(code, "<f8"))
        if dtype.kind == "f":
            raise self._broken(f"dtype code {code} is not an integer type")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if idx_size != expected:
            raise self._broken(f"it has {idx_size} bytes, its header requires {expected}")
        if sequences == 0 or entries < 2:
            raise DataError(f"{self._idx_path}: the corpus is empty; prepare it again from text")
        return dtype, sequences, entries

    def _map_index(self, sequences: int, entries: int) -> tuple[np.ndarray, ...]:
        """Map lengths int32, pointers int64 and document indices int64."""
        raw = np.memmap(self._idx_path, dtype=np.uint8, mode="r").view(np.ndarray)
        ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * entries]).tolist()
        names = ("<i4", "<i8", "<i8")
        return tuple(
            raw[start:stop].view(name)
            for start, stop, name in zip(ends[:-1], ends[1:], names, strict=True)
        )

    def _check_ends(self, bin_size: int) -> None:
        if self._pointers[0] != 0:
            raise self._broken("its first sequence does not start at byte 0")
        if self._documents[0] != 0 or self._documents[-1] != len(self._lengths):
            raise self._broken("its documents do not cover its sequences")
        expected = int(self._pointers[-1]) + int(self._lengths[-1]) * self._itemsize
        if bin_size < expected:
            raise DataError(
                f"{self._bin_path}: truncated: {bin_size} bytes of {expected}; copy it again"
            )
        if bin_size != expected or bin_size % self._itemsize:
            raise self._broken(f"it describes {expected} bytes of {bin_size} in the .bin file")

    def _check_pointers(self) -> None:
        """Check that each sequence ends where the next starts and that documents ascend."""
        last = len(self._lengths) - 1
        rows = np.unique(np.linspace(0, last, SPOT_CHECKS).astype(np.int64))
        rows = rows[rows < last]
        ends = self._pointers[rows] + self._lengths[rows].astype(np.int64) * self._itemsize
        if np.any(self._lengths[rows] < 0) or np.any(ends != self._pointers[rows + 1]):
            raise self._broken("a sequence does not end where the next one starts")
        rows = np.linspace(0, len(self._documents) - 1, SPOT_CHECKS).astype(np.int64)
        if np.any(np.diff(self._documents[rows]) < 0):
            raise self._broken("its document indices are not in ascending order")

    def _broken(self, reason: str) -> InputError:
        return DataError(f"{self._idx_path}: broken index: {reason}; prepare or copy it again")


def _size_of(path: Path) -> int:
    """Return the size in bytes of a required, non-empty file."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; a corpus is PREFIX.bin and PREFIX.idx"
        ) from error
    if size == 0:
        raise DataError(f"{path}: the file is empty; prepare or copy it again")
    return size


class IndexedWriter:
    """Writer of a corpus under temporary names; `finalize` renames the two files.

    As a context manager it removes the temporary files if exited without `finalize`.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self._lengths = array("i")
        self._paths = [with_suffix(prefix, suffix) for suffix in (".bin", ".idx")]
        self._partial = [partial_path(path) for path in self._paths]
        self._bin: BinaryIO = self._partial[0].open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bin.close()
        for path in self._partial:
            path.unlink(missing_ok=True)

    def add_document(self, tokens: np.ndarray) -> None:
        """Append a document of one sequence: token ids of any integer dtype, [length]."""
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(len(tokens))

    def append(self, prefix: Path) -> None:
        """Append all documents of a corpus written by an IndexedWriter of the same dtype."""
        with with_suffix(prefix, ".bin").open("rb") as part:
            shutil.copyfileobj(part, self._bin, COPY_BYTES)
        with with_suffix(prefix, ".idx").open("rb") as idx:
            sequences = HEADER.unpack(idx.read(HEADER.size))[3]
            self._lengths.frombytes(idx.read(4 * sequences))

    def finalize(self) -> None:
        """Write the index, sync both files and rename them."""
        with self._partial[1].open("wb") as idx:
            self._write_index(idx)
        self._bin.close()
        for partial, path in zip(self._partial, self._paths, strict=True):
            publish(partial, path)

    def _write_index(self, idx: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype="<i4")
        count = len(lengths)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        idx.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype], count, count + 1))
        idx.write(lengths.data)
        idx.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).data)
        idx.write(np.arange(count + 1, dtype=np.int64).data)
