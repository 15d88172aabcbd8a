"""Writes a target piece by piece, checks what is on the disk, and gives it its name."""

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.tensor_file import DTYPES
from megagrow.common.disk_space import check_room
from megagrow.common.file_io import raw_bytes, sync, write_bytes
from megagrow.common.progress import WorkProgress
from megagrow.growth.map import Kind
from megagrow.offline.journal import JOURNAL_FILE, Journal
from megagrow.offline.target import Piece, Target
from megagrow.offline.verifying import DamagedPiece, verify_files
from megagrow.reshard.layout import Block, Layout

Make = Callable[[str, Kind, Block], torch.Tensor]
"""Gives any rectangle of the target: (name, kind, block) -> (rows, columns) fp32."""


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
        """Compares everything on the disk with what was written, and then writes what stands
        beside the tensors, with the checksums of the files that were read."""
        try:
            files = verify_files(self.folder, self.target, journal.done, progress.advance)
        except DamagedPiece as error:
            journal.void(error.piece)
            raise
        self.target.write_documents(self.folder, files)

    def finish(self, final: Path) -> None:
        """Gives the folder its name."""
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
    """InputError if the disk of a folder has no room for what is not there yet."""
    there = 0
    if begun.is_dir():
        there = sum(path.stat().st_blocks * 512 for path in begun.iterdir())
    check_room(folder, sum(target.sizes.values()) - there)


def _blocks(layout: Layout, name: str, rank: int, at_once: int) -> Iterator[Block]:
    """What a rank holds, in the order of its storage, in rectangles of some rows; as many as would
    make `at_once` elements if they were whole, for their sources may be."""
    step = max(1, at_once // layout.plan[name].cols)
    for block in layout.blocks(name, rank):
        for first in range(block.rows.start, block.rows.stop, step):
            yield Block(range(first, min(first + step, block.rows.stop)), block.cols)
