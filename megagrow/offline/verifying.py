"""Reads everything back from the disk that was written in pieces, file by file, once.

On the way each piece is compared with the checksum of what was written, and the checksum of the
whole file is taken. Held at once: some megabytes, and three numbers for each piece.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import xxhash

from megagrow.checkpoint.tensor_file import Planned
from megagrow.common.checksums import READ_BYTES, FileRecord, Files, forget
from megagrow.common.file_io import raw_bytes, read_bytes
from megagrow.errors import InputError
from megagrow.offline.target import Target


class DamagedPiece(InputError):
    """A piece, by its number in the target's order, is not on the disk as it was written."""

    def __init__(self, piece: int, text: str) -> None:
        super().__init__(text)
        self.piece = piece


def verify_files(
    folder: Path, target: Target, written: Mapping[int, int], advance: Callable[[int], None]
) -> Files:
    """What a manifest has to know of the target's files. `written` has the CRC-32 of each piece;
    `advance` is told of bytes that were read. InputError for what is not as it was written."""
    for name in target.sizes:
        forget(folder / name)
    index = _Index(target)
    return {
        name: _verify_file(folder / name, file, index.of(name), target, written, advance)
        for name, file in target.headers()
    }


class _Index:
    """Which pieces a file has, in the order in which they stand there; there may be half a million
    of them."""

    def __init__(self, target: Target) -> None:
        self._numbers = {name: number for number, name in enumerate(target.sizes)}
        rows = (
            (self._numbers[piece.file], piece.stored.begin, piece.stored.nbytes)
            for piece in target.pieces()
        )
        table = np.fromiter(rows, np.dtype((np.int64, 3)))
        self._order = np.lexsort((table[:, 1], table[:, 0]))
        self._table = table[self._order]

    def of(self, name: str) -> Iterator[tuple[int, int, int]]:
        """(number of the piece, first byte, bytes) of each piece of a file."""
        number = self._numbers[name]
        first, last = np.searchsorted(self._table[:, 0], (number, number + 1))
        for at in range(first, last):
            yield int(self._order[at]), int(self._table[at, 1]), int(self._table[at, 2])


def _verify_file(
    path: Path,
    file: Planned,
    pieces: Iterator[tuple[int, int, int]],
    target: Target,
    written: Mapping[int, int],
    advance: Callable[[int], None],
) -> FileRecord:
    whole = xxhash.xxh3_64()
    buffer = torch.empty(READ_BYTES, dtype=torch.uint8)

    def read(begin: int, size: int) -> int:
        """Takes the next bytes of the file in; returns their CRC-32."""
        checksum = 0
        for first in range(0, size, READ_BYTES):
            part = buffer[: min(READ_BYTES, size - first)]
            read_bytes(path, part, begin + first)
            whole.update(raw_bytes(part))
            checksum = zlib.crc32(raw_bytes(part), checksum)
            advance(len(part))
        return checksum

    again = "give the same command again to write it anew, and have a look at the disk"
    if read(0, len(file.header)) != zlib.crc32(file.header):
        raise InputError(f"{path}: its header is not on the disk as it was written; {again}")
    end = len(file.header)
    for number, begin, size in pieces:
        assert begin == end, "the pieces of a file fill it without a gap"
        end += size
        if read(begin, size) != written[number]:
            piece = next(islice(target.pieces(), number, None))
            text = f"{path}: {piece.unit.tensor} is not on the disk as it was written; {again}"
            raise DamagedPiece(number, text)
    assert end == file.size
    return FileRecord(end, whole.hexdigest())
