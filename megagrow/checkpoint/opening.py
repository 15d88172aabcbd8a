"""Opens whatever a growth between files can begin with."""

from collections.abc import Callable
from pathlib import Path

from megagrow.checkpoint.files import list_checkpoints
from megagrow.checkpoint.hugging_face import open_hugging_face
from megagrow.checkpoint.hugging_face_config import CONFIG_FILE
from megagrow.checkpoint.manifest import MANIFEST_FILE, verify_checkpoint
from megagrow.checkpoint.newest import newest_whole
from megagrow.checkpoint.source import Source, open_checkpoint
from megagrow.errors import InputError


def open_source(path: Path, say: Callable[[str], None]) -> Source:
    """A checkpoint, the newest whole one of a run, or a Hugging Face folder. A checkpoint is read
    once to compare it with its checksums. InputError if it is damaged, or nothing of these."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory")
    if (path / MANIFEST_FILE).is_file():
        verify_checkpoint(path)
        return open_checkpoint(path)
    if (path / CONFIG_FILE).is_file():
        return open_hugging_face(path)
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            found = newest_whole(folder, say)
            assert found is not None
            return open_checkpoint(found[0])
    raise InputError(f"{path}: neither a checkpoint nor a run directory nor a Hugging Face folder")
