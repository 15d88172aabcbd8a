"""Search for the newest valid checkpoint."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from megagrow.checkpoint.manifest import Manifest, verify_checkpoint
from megagrow.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

FoundCheckpoint = tuple[Path, Manifest]
"""A checkpoint and its manifest."""


def newest_valid(directory: Path) -> FoundCheckpoint | None:
    """Return the newest valid checkpoint under a directory, None if there is no checkpoint at all.

    "Newest" means most steps. One process reads every byte. Damaged checkpoints are skipped with a
    warning. Raises CheckpointError if all of them are damaged.
    """
    return last_valid(directory, list_checkpoints(directory), verify_checkpoint)


def last_valid(
    directory: Path,
    paths: list[Path],
    verify: Callable[[Path], Manifest],
    level: int = logging.WARNING,
) -> FoundCheckpoint | None:
    """Return the last of `paths` that `verify` accepts, as `newest_valid` does.

    `level` is the severity at which skipped checkpoints are logged.
    """
    problems: list[str] = []
    for path in reversed(paths):
        try:
            return path, verify(path)
        except InputError as error:
            logger.log(level, "skipped a damaged checkpoint: %s", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no valid checkpoint under {directory}: {problems[0]}")
    return None


_NAME = re.compile(r"step-(\d{9,})", re.ASCII)
_UNFINISHED = re.compile(r"step-\d{9,}(\.(old|removed))?(\.\d+)?\.tmp", re.ASCII)


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
    """Return unfinished checkpoint folders: being written or removed, or left by a crash."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _UNFINISHED.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))
