"""Opens whatever a growth between files can begin with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megagrow.checkpoint.discovery import newest_valid
from megagrow.checkpoint.files import list_checkpoints
from megagrow.checkpoint.manifest import MANIFEST_FILE, verify_checkpoint
from megagrow.checkpoint.source import Source, open_checkpoint
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.formats.hugging_face_config import CONFIG_FILE
from megagrow.growth.map import StateKind
from megagrow.reshard.layout import Block


def open_source(path: Path, say: Callable[[str], None]) -> Source:
    """A checkpoint, the newest whole one of a run, or a Hugging Face folder. A checkpoint is read
    once to compare it with its checksums. InputError if it is damaged, or nothing of these."""
    return open_found(find_source(path, say))


def open_found(folder: Path) -> Source:
    """A checkpoint or a Hugging Face folder of which it is known that it is whole."""
    is_checkpoint = (folder / MANIFEST_FILE).is_file()
    return open_checkpoint(folder) if is_checkpoint else open_hugging_face(folder)


def find_source(path: Path, say: Callable[[str], None]) -> Path:
    """The folder that `open_source` opens; a checkpoint was compared with its checksums."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if (path / MANIFEST_FILE).is_file():
        verify_checkpoint(path)
        return path
    if (path / CONFIG_FILE).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            found = newest_valid(folder, say)
            assert found is not None
            return found[0]
    raise CheckpointError(
        f"{path}: neither a checkpoint nor a run directory nor a Hugging Face folder"
    )


ELEMENTS_AT_ONCE = 2**20
"""Of a tensor that are read and written at once, or one row."""


def row_pieces(source: Source, name: str, kind: StateKind, block: Block) -> Iterator[Tensor]:
    """A rectangle of a logical tensor, some rows at a time; zeros where the source has no such
    kind of state."""
    at_once = max(1, ELEMENTS_AT_ONCE // len(block.cols))
    for first in range(block.rows.start, block.rows.stop, at_once):
        some = Block(range(first, min(first + at_once, block.rows.stop)), block.cols)
        if kind in source.kinds:
            yield source.read(name, kind, some)
        else:
            yield torch.zeros(len(some.rows), len(some.cols))
