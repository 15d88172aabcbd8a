"""Checksums of files: xxh3 of 64 bits (https://xxhash.com), which keeps up with any disk.

They find what a disk, a cable or a copy has done to a file. They are no protection against someone
who changes file and checksum together.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from megagrow.common.file_io import raw_bytes, read_bytes
from megagrow.errors import CheckpointError, InputError

READ_BYTES = 2**22
"""What is read, and held, at once."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of a file."""

    bytes: int
    xxh3_64: str
    """Of all bytes of the file, as 16 hexadecimal digits."""


Files = dict[str, FileRecord]
"""The files of a checkpoint by their names."""


def text_checksum(text: str) -> str:
    """The checksum of a text as a file of UTF-8 would have it."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def check_size(path: Path, record: FileRecord) -> None:
    """InputError if a file is not there, or of another size."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing; use another checkpoint")
    found = path.stat().st_size
    if found != record.bytes:
        raise CheckpointError(
            f"{path}: truncated or damaged, {found} bytes instead of {record.bytes}"
        )


def check_file(path: Path, record: FileRecord) -> None:
    """Reads a whole file. InputError if a byte of it is not as it was written."""
    check_size(path, record)
    checksum = xxhash.xxh3_64()
    buffer = torch.empty(min(record.bytes, READ_BYTES), dtype=torch.uint8)
    for first in range(0, record.bytes, READ_BYTES):
        part = buffer[: min(READ_BYTES, record.bytes - first)]
        read_bytes(path, part, first)
        checksum.update(raw_bytes(part))
    if checksum.hexdigest() != record.xxh3_64:
        raise CheckpointError(
            f"{path}: damaged, its checksum is {checksum.hexdigest()} instead of {record.xxh3_64}"
        )


def problem_of(path: Path, record: FileRecord) -> str | None:
    """What `check_file` finds wrong with a file, if anything."""
    try:
        check_file(path, record)
    except InputError as error:
        return str(error)
    return None


def forget(path: Path) -> None:
    """Asks the system to read a file from the disk the next time, not from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
