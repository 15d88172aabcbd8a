"""Writes a target piece by piece, checks what is on the disk, and gives it its name."""

import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.files import sync
from megagrow.checkpoint.journal import JOURNAL_FILE, Journal
from megagrow.checkpoint.target import Piece, Target
from megagrow.checkpoint.tensor_file import DTYPES, raw_bytes, read_bytes
from megagrow.config.sizes import format_bytes
from megagrow.data.progress import WorkProgress
from megagrow.errors import InputError
from megagrow.growth.map import Kind
from megagrow.reshard.layout import Block, Layout

Make = Callable[[str, Kind, Block], torch.Tensor]
"""Gives any rectangle of the target: (name, kind, block) -> (rows, columns) fp32."""

_READ_BYTES = 2**22
"""What is read back at once."""


@dataclass(frozen=True)
class Writing:
    """The work on one target in a folder."""

    folder: Path
    target: Target
    make: Make
    at_once: int
    """Elements of a piece that are made at once."""

    def write(self, journal: Journal, progress: WorkProgress) -> None:
        """Writes all pieces that the journal does not know of."""
        self.target.write_headers(self.folder)
        for number, piece in enumerate(self.target.pieces()):
            if number in journal.done:
                progress.resume(piece.stored.nbytes)
                continue
            path = self.folder / piece.file
            journal.add(number, self._write(piece, path, progress), path, piece.stored.nbytes)
        journal.commit()

    def verify(self, journal: Journal, progress: WorkProgress) -> None:
        """Compares every piece on the disk with the checksum of what was written."""
        for name in self.target.sizes:
            _forget(self.folder / name)
        for number, piece in enumerate(self.target.pieces()):
            path = self.folder / piece.file
            if _checksum(path, piece, progress) != journal.done[number]:
                journal.void(number)
                raise InputError(
                    f"{path}: {piece.unit.tensor} is not on the disk as it was written; give the "
                    "same command again to write it anew, and have a look at the disk"
                )

    def finish(self, final: Path) -> None:
        """Writes what stands beside the tensors and gives the folder its name."""
        self.target.write_documents(self.folder)
        self.folder.rename(final)
        sync(final.parent)
        (final / JOURNAL_FILE).unlink()
        sync(final)

    def _write(self, piece: Piece, path: Path, progress: WorkProgress) -> int:
        """Writes one piece and returns its checksum."""
        layout, unit, checksum = self.target.layout, piece.unit, 0
        offset, end = piece.stored.begin, piece.stored.begin + piece.stored.nbytes
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for block in _blocks(layout, unit.name, unit.rank, self.at_once):
                values = self.make(unit.name, unit.kind, block)
                written = raw_bytes(values.to(DTYPES[piece.stored.dtype]))
                _write_all(descriptor, written, offset)
                checksum = zlib.crc32(written, checksum)
                offset += len(written)
                progress.advance(len(written))
            padding = bytes(end - offset)  # of the vocabulary
            _write_all(descriptor, memoryview(padding), offset)
            progress.advance(len(padding))
            return zlib.crc32(padding, checksum)
        finally:
            os.close(descriptor)


def check_space(folder: Path, target: Target, begun: Path) -> None:
    """InputError if the disk of a folder has no room for what is not there yet."""
    there = 0
    if begun.is_dir():
        there = sum(path.stat().st_blocks * 512 for path in begun.iterdir())
    needed, free = sum(target.sizes.values()) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: has {format_bytes(free)} of room, {format_bytes(needed)} are needed; free "
            "the disk or write elsewhere"
        )


def _blocks(layout: Layout, name: str, rank: int, at_once: int) -> Iterator[Block]:
    """What a rank holds, in the order of its storage, in rectangles of some rows; as many as would
    make `at_once` elements if they were whole, for their sources may be."""
    step = max(1, at_once // layout.plan[name].cols)
    for block in layout.blocks(name, rank):
        for first in range(block.rows.start, block.rows.stop, step):
            yield Block(range(first, min(first + step, block.rows.stop)), block.cols)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _forget(path: Path) -> None:
    """Asks the system to read a file from the disk the next time, not from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _checksum(path: Path, piece: Piece, progress: WorkProgress) -> int:
    begin, size, checksum = piece.stored.begin, piece.stored.nbytes, 0
    buffer = torch.empty(min(size, _READ_BYTES), dtype=torch.uint8)
    for first in range(0, size, _READ_BYTES):
        part = buffer[: min(_READ_BYTES, size - first)]
        read_bytes(path, part, begin + first)
        checksum = zlib.crc32(raw_bytes(part), checksum)
        progress.advance(len(part))
    return checksum
