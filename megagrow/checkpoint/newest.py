"""Finds the newest whole checkpoint under a directory."""

from collections.abc import Callable
from pathlib import Path

from megagrow.checkpoint.files import list_checkpoints
from megagrow.checkpoint.manifest import Manifest, read_manifest
from megagrow.errors import InputError


def newest_whole(directory: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole; None if there is none at all.

    A damaged one is named through `say` and passed over. InputError if all of them are damaged.
    """
    problems = []
    for path in reversed(list_checkpoints(directory)):
        try:
            return path, read_manifest(path)
        except InputError as error:
            say(f"passed over a checkpoint: {error}")
            problems.append(str(error))
    if problems:
        raise InputError(f"no checkpoint under {directory} is whole: {problems[0]}")
    return None
