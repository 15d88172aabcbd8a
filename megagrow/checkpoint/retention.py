"""Retention policy of checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.discovery import list_checkpoints, step_of
from megagrow.checkpoint.manifest import Manifest, parse_manifest, read_manifest
from megagrow.checkpoint.removal import remove_unfinished, try_to_remove, warn_kept
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
    """Remove checkpoints outside the policy, and leftovers of crashes; called by rank 0.

    What cannot be removed is logged once and tried again by the next call.
    """
    try:
        for path in superfluous(directory, retention):
            try_to_remove(path)
        remove_unfinished(directory)
    except (OSError, InputError) as error:
        warn_kept(directory, error)


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
