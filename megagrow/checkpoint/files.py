"""Names and listing of checkpoint folders and files."""

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{9,})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps of the run."""
    return f"step-{step:09d}"


def shard_name(rank: int) -> str:
    """Return the file name of one rank."""
    return f"rank-{rank:05d}.safetensors"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return all finished checkpoints in a folder, oldest first, without unfinished ones."""
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def unfinished(directory: Path) -> list[Path]:
    """Return unfinished checkpoint folders: being written, or left by a crash."""
    return sorted(directory.glob("step-*.tmp"))


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))
