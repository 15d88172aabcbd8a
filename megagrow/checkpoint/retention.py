"""Retention policy of checkpoints, and their removal."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.discovery import list_checkpoints, step_of, unfinished
from megagrow.checkpoint.manifest import Manifest, parse_manifest, read_manifest
from megagrow.common.atomic_files import staging_folder
from megagrow.errors import InputError


@dataclass(frozen=True)
class Retention:
    """Retention policy: the most recent valid checkpoints, and those below."""

    keep_last: int
    """Number of most recent valid checkpoints to keep."""
    keep_every: int | None = None
    """Keep checkpoints whose step is a multiple of this number."""
    protected: bool = True
    """Keep checkpoints marked as protected."""


def superfluous(
    directory: Path, retention: Retention, read: Callable[[Path], Manifest] = read_manifest
) -> list[Path]:
    """Return the checkpoints that the policy does not keep, oldest first.

    `read` raises for invalid checkpoints. Checkpoints newer than the most recent valid ones are
    never included, as their damage has not been examined; nothing is included if none is valid.
    """
    found = list_checkpoints(directory)
    last: list[Path] = []
    for path in reversed(found):
        if len(last) < retention.keep_last and _is_whole(path, read):
            last.append(path)
    older = found[: found.index(last[-1])] if last else []
    return [path for path in older if not _is_kept(path, retention)]


def prune_checkpoints(directory: Path, retention: Retention) -> None:
    """Remove checkpoints outside the policy, and leftovers of crashes; called by rank 0."""
    for path in superfluous(directory, retention):
        remove_checkpoint(path)
    remove_unfinished(directory)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint: rename it first, so that a crash leaves no partial checkpoint."""
    doomed = staging_folder(path)
    path.rename(doomed)
    _remove(doomed)


def remove_unfinished(directory: Path) -> None:
    """Remove leftovers of unfinished saves. No save may be in progress."""
    for path in unfinished(directory):
        _remove(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # another process removes the same checkpoint
        shutil.rmtree(path)


def _is_whole(path: Path, read: Callable[[Path], Manifest]) -> bool:
    try:
        read(path)
    except InputError:
        return False
    return True


def _is_kept(path: Path, retention: Retention) -> bool:
    """Return True if the policy keeps a checkpoint regardless of its age.

    A damaged one is kept only if its manifest is readable and marks it as protected.
    """
    try:
        protected = parse_manifest(path).protected is not None
    except InputError:
        return False
    if protected and retention.protected:
        return True
    every = retention.keep_every
    return every is not None and step_of(path) % every == 0 and _is_whole(path, read_manifest)
