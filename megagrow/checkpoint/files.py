"""The files of checkpoints: names, listing, and making sure that they are on the disk."""

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{9,})")


def checkpoint_name(step: int) -> str:
    """The directory of the checkpoint after `step` steps of the run."""
    return f"step-{step:09d}"


def shard_name(rank: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}.safetensors"


def list_checkpoints(directory: Path) -> list[Path]:
    """All finished checkpoints under a directory, oldest first; those still being written not."""
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def unfinished(directory: Path) -> list[Path]:
    """What is still being written under a directory, or was left there by a crash."""
    return sorted(directory.glob("step-*.tmp"))


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))
