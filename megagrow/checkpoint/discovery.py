"""Finds the newest whole checkpoint under a directory: every byte of it is read."""

from collections.abc import Callable
from pathlib import Path

from megagrow.checkpoint.files import list_checkpoints
from megagrow.checkpoint.manifest import Manifest, verify_checkpoint
from megagrow.errors import CheckpointError, InputError


def newest_whole(directory: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole, found by one process; None if there is none at all.

    A damaged one is named through `say` and passed over. InputError if all of them are damaged.
    """
    return first_whole(directory, list_checkpoints(directory), verify_checkpoint, say)


def first_whole(
    directory: Path,
    paths: list[Path],
    verify: Callable[[Path], Manifest],
    say: Callable[[str], None],
) -> tuple[Path, Manifest] | None:
    """The last of the paths that `verify` has nothing to say against, as `newest_whole`."""
    problems = []
    for path in reversed(paths):
        try:
            return path, verify(path)
        except InputError as error:
            say(f"passed over a checkpoint: {error}")
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no checkpoint under {directory} is whole: {problems[0]}")
    return None
