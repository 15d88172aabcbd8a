"""Open the source of an offline growth or conversion: a checkpoint or a Hugging Face folder."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megagrow.checkpoint.discovery import FoundCheckpoint, list_checkpoints, newest_valid
from megagrow.checkpoint.load import newest_valid_on_all_ranks, verify_on_all_ranks
from megagrow.checkpoint.manifest import MANIFEST_FILE, Manifest, verify_checkpoint
from megagrow.checkpoint.source import Source, open_checkpoint
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.formats.hugging_face_config import CONFIG_FILE
from megagrow.parallel.agreement import run_on_rank_zero
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.layout import Block

logger = logging.getLogger(__name__)


def open_source(path: Path) -> Source:
    """Open a checkpoint, the newest valid one of a run, or a Hugging Face folder; log its warnings.

    A checkpoint is read once to verify its checksums. Raises CheckpointError if it is damaged or
    the path is none of these.
    """
    source = _open(find_source(path), verified=False)
    log_warnings(source)
    return source


def log_warnings(source: Source) -> None:
    """Log the warnings of a source."""
    for line in source.warnings:
        logger.warning("%s", line)


def open_found(folder: Path) -> Source:
    """Open a checkpoint or a Hugging Face folder that has been verified.

    Of a checkpoint, only the manifest and the headers of the files that are read are opened.
    """
    return _open(folder, verified=True)


def _open(folder: Path, verified: bool) -> Source:
    if (folder / MANIFEST_FILE).is_file():
        return open_checkpoint(folder, verified)
    return open_hugging_face(folder)


def find_source(path: Path) -> Path:
    """Return the folder that `open_source` opens; a checkpoint's checksums are verified."""
    return _verified(_candidates(path), verify_checkpoint, newest_valid)


def find_source_on_all_ranks(path: Path) -> Path:
    """Return `find_source`, the same on all ranks, each of which verifies its share of the files.

    Collective.
    """
    found = run_on_rank_zero(lambda: _candidates(path))
    return _verified(found, verify_on_all_ranks, newest_valid_on_all_ranks)


def require_source(path: Path) -> None:
    """Raise CheckpointError if `find_source` would find none. No file is read."""
    _candidates(path)


def _verified(
    found: tuple[Path, list[Path]],
    verify: Callable[[Path], Manifest],
    newest: Callable[[Path], FoundCheckpoint | None],
) -> Path:
    folder, checkpoints = found
    if checkpoints == [folder]:
        verify(folder)
    elif checkpoints:
        valid = newest(folder)
        assert valid is not None
        folder = valid[0]
    return folder


def _candidates(path: Path) -> tuple[Path, list[Path]]:
    """Return a folder and its checkpoints, the newest last.

    The list is empty for a Hugging Face folder, and the folder itself for a checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if (path / MANIFEST_FILE).is_file():
        return path, [path]
    if (path / CONFIG_FILE).is_file():
        return path, []
    for folder in (path / "checkpoints", path):
        if checkpoints := list_checkpoints(folder):
            return folder, checkpoints
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
        if kind in source.kinds_of(name):
            yield source.read(name, kind, some)
        else:
            yield torch.zeros(len(some.rows), len(some.cols))
