"""Megatron-LM's indexed format: a tokenized corpus as PREFIX.bin and PREFIX.idx.

PREFIX.bin contains the token ids. PREFIX.idx, little-endian:

    magic b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, sequence count u64, document count u64,
    sequence lengths int32 [sequence count], in tokens,
    sequence pointers int64 [sequence count], in bytes into PREFIX.bin,
    document indices int64 [document count]: 0, then the sequence after each document's last one.

So "document count" is the number of documents plus one. Source: Megatron-LM,
megatron/core/datasets/indexed_dataset.py.
"""

import errno
import os
import shutil
import stat
import struct
import weakref
from array import array
from pathlib import Path
from typing import BinaryIO, Self, overload

import numpy as np

from megagrow.common.atomic_files import partial_path, publish
from megagrow.errors import DataError, InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODE_OF_DTYPE = {np.dtype(name): code for code, name in DTYPE_OF_CODE.items()}

COPY_BYTES = 1 << 24
SEARCH_BLOCK = 512
"""Elements that a search reads at once."""
PROBES_KEPT = 4096
"""Elements that searches keep in memory: the first ones probed, which every search needs."""
SPOT_CHECKS = 1024
"""Sequences whose pointers are checked on opening: all or, in large corpora, a sample."""


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return PREFIX + suffix; unlike Path.with_suffix, keeps dots in the prefix."""
    return prefix.with_name(prefix.name + suffix)


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype Megatron-LM uses for the ids of a vocabulary: uint16 or int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class CorpusFile:
    """File of a corpus, open until the object is deleted.

    A file that is later renamed to its path does not replace it. Unlike a memory map, whose reader
    is killed by SIGBUS, a file that is truncated or cannot be read raises DataError.
    """

    def __init__(self, path: Path) -> None:
        """Open a required, non-empty file. Raises DataError."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            hint = "a corpus is PREFIX.bin and PREFIX.idx"
            if error.errno == errno.EMFILE:
                hint = "every corpus keeps its files open; raise the limit with ulimit -n"
            raise DataError(f"{path}: {error.strerror}; {hint}") from error
        weakref.finalize(self, os.close, self._descriptor)
        info = os.fstat(self._descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path}: not a file; a corpus is PREFIX.bin and PREFIX.idx")
        if info.st_size == 0:
            raise DataError(f"{path}: the file is empty; prepare or copy it again")
        self.size = info.st_size

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from an offset. Raises DataError."""
        try:
            raw = os.pread(self._descriptor, size, offset)
            while len(raw) < size:  # one read returns at most 2 GiB
                more = os.pread(self._descriptor, size - len(raw), offset + len(raw))
                if not more:
                    raise DataError(
                        f"{self.path}: truncated while in use, it had {self.size} bytes and ends "
                        f"before byte {offset + size}; copy it again and resume the run"
                    )
                raw += more
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        return raw


class FileArray:
    """One-dimensional array in a file; elements and slices are read when indexed."""

    def __init__(self, file: CorpusFile, dtype: np.dtype, offset: int, size: int) -> None:
        self.dtype = dtype
        self._file, self._offset, self._size = file, offset, size
        self._probed: dict[int, int] = {}

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> np.ndarray: ...

    def __getitem__(self, index: int | slice) -> int | np.ndarray:
        """Return an element, or a contiguous slice as a read-only array. Raises DataError."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._size)
            return self._read(start, max(stop - start, 0))
        return int(self._read(index % self._size, 1)[0])

    def first_from(self, value: int, start: int = 0) -> int:
        """Return the index of the first element >= `value` of the ascending elements from `start`.

        The size of the array if there is none; any index from `start` if they do not ascend.
        """
        low, high = start, self._size
        if start:  # the next one searched for is usually close
            high = min(start + SEARCH_BLOCK, high)
            if self[high - 1] < value:
                low, high = high, self._size
        while high - low > SEARCH_BLOCK:
            middle = (low + high) // 2
            if (element := self._probed.get(middle)) is None:
                element = self[middle]
                if len(self._probed) < PROBES_KEPT:
                    self._probed[middle] = element
            if element < value:
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self[low:high], value))

    def _read(self, start: int, count: int) -> np.ndarray:
        size = self.dtype.itemsize
        return np.frombuffer(
            self._file.read(self._offset + start * size, count * size), dtype=self.dtype
        )


class IndexedCorpus:
    """Tokenized corpus, validated on opening without a full scan.

    `tokens` is PREFIX.bin, one-dimensional, of the file's dtype. Raises DataError if a file is
    missing, empty, truncated or contradicts the other; also when it is read.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._idx_path = with_suffix(prefix, ".idx")
        self._bin_path = with_suffix(prefix, ".bin")
        idx, tokens = CorpusFile(self._idx_path), CorpusFile(self._bin_path)
        dtype, sequences, entries = self._read_header(idx)
        ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences]).tolist()
        self._lengths = FileArray(idx, np.dtype("<i4"), ends[0], sequences)
        self._pointers = FileArray(idx, np.dtype("<i8"), ends[1], sequences)
        self._documents = FileArray(idx, np.dtype("<i8"), ends[2], entries)
        self._itemsize = dtype.itemsize
        self._check_ends(tokens.size)
        self._check_pointers()
        self.tokens = FileArray(tokens, dtype, 0, tokens.size // dtype.itemsize)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return the offsets in [start, stop), in tokens, of document starts: int64, ascending."""
        first = self._pointers.first_from(start * self._itemsize)
        last = self._pointers.first_from(stop * self._itemsize, first)
        low = self._documents.first_from(first)
        rows = self._documents[low : self._documents.first_from(last, low)]
        if np.any((rows < first) | (rows >= last)):
            raise self._broken("its document indices are not in ascending order")
        starts: np.ndarray = self._pointers[first:last][rows - first] // self._itemsize
        if np.any((starts < start) | (starts >= stop)):
            raise self._broken("its sequence pointers are not in ascending order")
        return starts

    def _read_header(self, idx: CorpusFile) -> tuple[np.dtype, int, int]:
        """Return the dtype, the number of sequences and the number of document indices."""
        if idx.size < HEADER.size:
            raise self._broken(f"{idx.size} bytes, smaller than its header")
        magic, version, code, sequences, entries = HEADER.unpack(idx.read(0, HEADER.size))
        if magic != MAGIC or version != VERSION:
            raise self._broken("it is not a Megatron-LM index of version 1")
        dtype = np.dtype(DTYPE_OF_CODE.get(code, "<f8"))
        if dtype.kind == "f":
            raise self._broken(f"dtype code {code} is not an integer type")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if idx.size != expected:
            raise self._broken(f"it has {idx.size} bytes, its header requires {expected}")
        if sequences == 0 or entries < 2:
            raise DataError(f"{self._idx_path}: the corpus is empty; prepare it again from text")
        return dtype, sequences, entries

    def _check_ends(self, bin_size: int) -> None:
        if self._pointers[0] != 0:
            raise self._broken("its first sequence does not start at byte 0")
        if self._documents[0] != 0 or self._documents[-1] != len(self._lengths):
            raise self._broken("its documents do not cover its sequences")
        expected = self._pointers[-1] + self._lengths[-1] * self._itemsize
        if bin_size < expected:
            raise DataError(
                f"{self._bin_path}: truncated: {bin_size} bytes of {expected}; copy it again"
            )
        if bin_size != expected or bin_size % self._itemsize:
            raise self._broken(f"it describes {expected} bytes of {bin_size} in the .bin file")

    def _check_pointers(self) -> None:
        """Check that each sequence ends where the next starts and that documents ascend."""
        last = len(self._lengths) - 1
        for row in np.unique(np.linspace(0, last, SPOT_CHECKS).astype(np.int64)).tolist():
            if row == last:
                break
            start, end = self._pointers[row : row + 2].tolist()
            length = self._lengths[row]
            if length < 0 or start + length * self._itemsize != end:
                raise self._broken("a sequence does not end where the next one starts")
        rows = np.linspace(0, len(self._documents) - 1, SPOT_CHECKS).astype(np.int64).tolist()
        if np.any(np.diff([self._documents[row] for row in rows]) < 0):
            raise self._broken("its document indices are not in ascending order")

    def _broken(self, reason: str) -> InputError:
        return DataError(f"{self._idx_path}: broken index: {reason}; prepare or copy it again")


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
