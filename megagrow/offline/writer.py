"""Write a target piece by piece, verify it on disk, and publish it."""

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import xxhash

from megagrow.checkpoint.tensor_file import DTYPES, Planned, raw_bytes, read_bytes, write_bytes
from megagrow.common.atomic_files import check_room, publish, sync
from megagrow.common.checksums import READ_BYTES, FileRecord, Files, drop_from_cache
from megagrow.common.progress import WorkProgress
from megagrow.errors import ResourceError
from megagrow.offline.journal import JOURNAL_FILE, Journal
from megagrow.offline.target import Target, TargetPiece
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.layout import Block, Layout

Make = Callable[[str, StateKind, Block], torch.Tensor]
"""Function that returns any rectangle of the target: (name, kind, block) -> (rows, columns)
fp32."""


@dataclass(frozen=True)
class Writing:
    """Writer of one target in a folder."""

    folder: Path
    target: Target
    make: Make
    at_once: int
    """Maximum elements of a piece."""

    def write(self, journal: Journal, progress: WorkProgress) -> None:
        """Write all pieces that are not in the journal."""
        self.target.write_headers(self.folder)
        for number, piece in enumerate(self.target.pieces()):
            if number in journal.done:
                progress.resume(piece.stored.nbytes)
                continue
            path = self.folder / piece.file
            journal.add(number, self._write(piece, path, progress), path, piece.stored.nbytes)
        journal.commit()

    def verify(self, journal: Journal, progress: WorkProgress) -> None:
        """Verify everything on disk, then write the documents with the verified checksums."""
        try:
            files = verify_files(self.folder, self.target, journal.done, progress.advance)
        except DamagedPiece as error:
            journal.void(error.piece)
            raise
        self.target.write_documents(self.folder, files)

    def finish(self, final: Path) -> None:
        """Rename the folder to its final name."""
        publish(self.folder, final)
        (final / JOURNAL_FILE).unlink()
        sync(final)

    def _write(self, piece: TargetPiece, path: Path, progress: WorkProgress) -> int:
        """Write one piece and return its checksum."""
        layout, unit, checksum = self.target.layout, piece.unit, 0
        offset, end = piece.stored.begin, piece.stored.begin + piece.stored.nbytes
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for block in _blocks(layout, unit.name, unit.rank, self.at_once):
                values = self.make(unit.name, unit.kind, block)
                written = raw_bytes(values.to(DTYPES[piece.stored.dtype]))
                write_bytes(descriptor, written, offset)
                checksum = zlib.crc32(written, checksum)
                offset += len(written)
                progress.advance(len(written))
            padding = bytes(end - offset)  # of the vocabulary
            write_bytes(descriptor, memoryview(padding), offset)
            progress.advance(len(padding))
            return zlib.crc32(padding, checksum)
        finally:
            os.close(descriptor)


def check_space(folder: Path, target: Target, begun: Path) -> None:
    """Raise ResourceError if the disk lacks space for the remaining files."""
    there = 0
    if begun.is_dir():
        there = sum(path.stat().st_blocks * 512 for path in begun.iterdir())
    check_room(folder, sum(target.sizes.values()) - there)


def _blocks(layout: Layout, name: str, rank: int, at_once: int) -> Iterator[Block]:
    """Yield a rank's part of a tensor in storage order, as rectangles of rows.

    The number of rows is chosen as if rows were complete, because their sources may be.
    """
    step = max(1, at_once // layout.plan[name].cols)
    for block in layout.blocks(name, rank):
        for first in range(block.rows.start, block.rows.stop, step):
            yield Block(range(first, min(first + step, block.rows.stop)), block.cols)


class DamagedPiece(ResourceError):
    """Error: a piece on disk differs from the written data."""

    def __init__(self, piece: int, text: str) -> None:
        super().__init__(text)
        self.piece = piece


def verify_files(
    folder: Path, target: Target, written: Mapping[int, int], advance: Callable[[int], None]
) -> Files:
    """Return the file records for the manifest.

    `written` contains the CRC-32 of each piece; `advance` is called with the bytes read. Raises an
    error for mismatches.
    """
    for name in target.sizes:
        drop_from_cache(folder / name)
    index = _Index(target)
    return {
        name: _verify_file(folder / name, file, index.of(name), target, written, advance)
        for name, file in target.headers()
    }


class _Index:
    """Pieces of each file in file order; there may be half a million."""

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
        """Yield (piece index, first byte, bytes) of each piece of a file."""
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
        """Hash the next bytes of the file and return their CRC-32."""
        checksum = 0
        for first in range(0, size, READ_BYTES):
            part = buffer[: min(READ_BYTES, size - first)]
            read_bytes(path, part, begin + first)
            whole.update(raw_bytes(part))
            checksum = zlib.crc32(raw_bytes(part), checksum)
            advance(len(part))
        return checksum

    fix = "rerun the same command to write it again, and check the disk"
    if read(0, len(file.header)) != zlib.crc32(file.header):
        raise ResourceError(f"{path}: the header on disk differs from the written one; {fix}")
    end = len(file.header)
    for number, begin, size in pieces:
        assert begin == end, "the pieces of a file fill it without a gap"
        end += size
        if read(begin, size) != written[number]:
            piece = next(islice(target.pieces(), number, None))
            text = f"{path}: {piece.unit.tensor} on disk differs from the written data; {fix}"
            raise DamagedPiece(number, text)
    assert end == file.size
    return FileRecord(end, whole.hexdigest())
