"""Search for the newest valid checkpoint."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megagrow.checkpoint.manifest import Manifest, verify_checkpoint
from megagrow.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

FoundCheckpoint = tuple[Path, Manifest]
"""A checkpoint and its manifest."""

Content = TypeVar("Content")


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
    newest = next(valid_checkpoints(reversed(paths), verify, problems, level), None)
    if newest is None and problems:
        raise CheckpointError(f"no valid checkpoint under {directory}: {problems[0]}")
    return newest


def valid_checkpoints(
    paths: Iterable[Path],
    read: Callable[[Path], Content],
    problems: list[str] | None = None,
    level: int = logging.WARNING,
) -> Iterator[tuple[Path, Content]]:
    """Yield the checkpoints that `read` accepts; log the others at `level` and skip them.

    `problems` collects the messages of the errors.
    """
    for path in paths:
        try:
            content = read(path)
        except InputError as error:
            logger.log(level, "skipped a damaged checkpoint: %s", error)
            if problems is not None:
                problems.append(str(error))
        else:
            yield path, content


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
