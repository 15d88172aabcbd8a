"""Open the source of an offline growth or conversion: a checkpoint or a Hugging Face folder."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megagrow.checkpoint.discovery import list_checkpoints, newest_valid
from megagrow.checkpoint.manifest import MANIFEST_FILE, verify_checkpoint
from megagrow.checkpoint.source import Source, open_checkpoint
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.formats.hugging_face_config import CONFIG_FILE
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.layout import Block

logger = logging.getLogger(__name__)


def open_source(path: Path) -> Source:
    """Open a checkpoint, the newest valid one of a run, or a Hugging Face folder; log its warnings.

    A checkpoint is read once to verify its checksums. Raises CheckpointError if it is damaged or
    the path is none of these.
    """
    source = open_found(find_source(path))
    log_warnings(source)
    return source


def log_warnings(source: Source) -> None:
    """Log the warnings of a source."""
    for line in source.warnings:
        logger.warning("%s", line)


def open_found(folder: Path) -> Source:
    """Open a checkpoint or a Hugging Face folder that has been verified."""
    is_checkpoint = (folder / MANIFEST_FILE).is_file()
    return open_checkpoint(folder) if is_checkpoint else open_hugging_face(folder)


def find_source(path: Path) -> Path:
    """Return the folder that `open_source` opens; a checkpoint's checksums are verified."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if (path / MANIFEST_FILE).is_file():
        verify_checkpoint(path)
        return path
    if (path / CONFIG_FILE).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            newest = newest_valid(folder)
            assert newest is not None
            return newest[0]
    raise CheckpointError(
        f"{path}: neither a checkpoint nor a run directory nor a Hugging Face folder"
    )


ELEMENTS_AT_ONCE = 2**20
"""Elements of a tensor read and written at a time; at least one row."""


def row_pieces(source: Source, name: str, kind: StateKind, block: Block) -> Iterator[Tensor]:
    """Yield a rectangle of a logical tensor in row chunks; zeros for states the source lacks."""
    at_once = max(1, ELEMENTS_AT_ONCE // len(block.cols))
    for first in range(block.rows.start, block.rows.stop, at_once):
        some = Block(range(first, min(first + at_once, block.rows.stop)), block.cols)
        if kind in source.kinds:
            yield source.read(name, kind, some)
        else:
            yield torch.zeros(len(some.rows), len(some.cols))
