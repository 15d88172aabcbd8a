"""Find the newest valid checkpoint; damaged ones are skipped with a warning."""

import logging
from collections.abc import Callable
from pathlib import Path

from megagrow.checkpoint.files import list_checkpoints
from megagrow.checkpoint.manifest import Manifest, verify_checkpoint
from megagrow.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)


def newest_whole(directory: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint whose files match their checksums; None if there is none.

    "Newest" means most steps. Damaged checkpoints are skipped with a warning. Raises
    CheckpointError if all of them are damaged.
    """
    return first_whole(directory, list_checkpoints(directory), verify_checkpoint)


def first_whole(
    directory: Path,
    paths: list[Path],
    verify: Callable[[Path], Manifest],
    level: int = logging.WARNING,
) -> tuple[Path, Manifest] | None:
    """Return the last of `paths` that `verify` accepts, as `newest_whole` does.

    `level` is the severity at which skipped checkpoints are logged.
    """
    problems = []
    for path in reversed(paths):
        try:
            return path, verify(path)
        except InputError as error:
            logger.log(level, "skipped a damaged checkpoint: %s", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no valid checkpoint under {directory}: {problems[0]}")
    return None
