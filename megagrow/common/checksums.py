"""Sizes and checksums of files in the format of manifests.

Checkpoints use 64-bit xxh3 (https://xxhash.com), which is faster than any disk; prepared corpora
use 256-bit BLAKE2b. Checksums detect damage by disks, cables and copies. They do not protect
against someone who changes both the file and its checksum.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import xxhash

from megagrow.common.progress import PhaseProgress
from megagrow.common.untrusted_values import MOST
from megagrow.errors import CheckpointError, InputError

READ_BYTES = 2**22
"""Buffer size of a read."""

Algorithm = Literal["xxh3_64", "blake2b"]

_HASHES: dict[Algorithm, Callable[[], Any]] = {
    "xxh3_64": xxhash.xxh3_64,
    "blake2b": partial(hashlib.blake2b, digest_size=32),
}

_SIZE_KEYS: dict[Algorithm, str] = {"xxh3_64": "bytes", "blake2b": "size"}
"""Key of the file size in a manifest with this algorithm; the checksum's key is the algorithm."""


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file."""

    size: int
    """Bytes."""
    checksum: str
    """Checksum of the file's bytes, hexadecimal."""
    algorithm: Algorithm = "xxh3_64"

    @classmethod
    def of(cls, path: Path, algorithm: Algorithm) -> "FileRecord":
        """Return the record of a file on the disk. Raises OSError."""
        with path.open("rb", buffering=0) as file:
            size, checksum = _hash(file, algorithm)
        return cls(size, checksum, algorithm)

    @classmethod
    def from_json(cls, values: Any, algorithm: Algorithm = "xxh3_64") -> "FileRecord":
        """Return the record that `to_json` serialized. Raises ValueError."""
        size_key = _SIZE_KEYS[algorithm]
        if not isinstance(values, dict) or values.keys() != {size_key, algorithm}:
            raise ValueError(f"a file record has the keys {size_key} and {algorithm}")
        size, checksum = values[size_key], values[algorithm]
        if type(size) is not int or not 0 <= size <= MOST or not isinstance(checksum, str):
            raise ValueError(f"{size_key} must be an integer from 0 and {algorithm} a string")
        return cls(size, checksum, algorithm)

    def to_json(self) -> dict[str, int | str]:
        """Return the entry of a manifest: {"bytes", "xxh3_64"} or {"size", "blake2b"}."""
        return {_SIZE_KEYS[self.algorithm]: self.size, self.algorithm: self.checksum}


Files = dict[str, FileRecord]
"""File name -> record."""


def text_checksum(text: str) -> str:
    """Return the xxh3 checksum of a text in UTF-8."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def check_size(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError if a file is missing or has another size."""
    try:
        info = path.stat()
    except FileNotFoundError:
        info = None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if info is None or not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path.parent}: {path.name} is missing; use another checkpoint")
    size = info.st_size
    if size != record.size:
        raise CheckpointError(
            f"{path}: truncated or damaged, {size} bytes instead of {record.size}"
        )


def check_file(path: Path, record: FileRecord) -> None:
    """Read a file completely; raise CheckpointError if its size or checksum differs."""
    check_size(path, record)
    try:
        checksum = FileRecord.of(path, record.algorithm).checksum
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if checksum != record.checksum:
        raise CheckpointError(
            f"{path}: damaged, its checksum is {checksum} instead of {record.checksum}"
        )


def problem_of(path: Path, record: FileRecord) -> str | None:
    """Return the message of the error that `check_file` raises, None if the file is valid."""
    try:
        check_file(path, record)
    except InputError as error:
        return str(error)
    return None


def problems_of_files(directory: Path, files: Collection[tuple[str, FileRecord]]) -> Iterator[str]:
    """Yield the problems of the files of a directory, given by name; logs its progress."""
    progress = PhaseProgress(f"verifying {directory}", len(files), "files")
    for name, record in files:
        problem = problem_of(directory / name, record)
        if problem is not None:
            yield problem
        progress.advance()


def problem_on_disk(path: Path, record: FileRecord) -> str | None:
    """Return `problem_of` a file, read from the disk instead of the page cache if possible."""
    with suppress(OSError):
        drop_from_cache(path)
    return problem_of(path, record)


def drop_from_cache(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _hash(file: Any, algorithm: Algorithm) -> tuple[int, str]:
    """Return the size and the checksum of an open file."""
    checksum, size = _HASHES[algorithm](), 0
    buffer = memoryview(bytearray(READ_BYTES))
    while count := file.readinto(buffer):
        checksum.update(buffer[:count])
        size += count
    return size, checksum.hexdigest()
