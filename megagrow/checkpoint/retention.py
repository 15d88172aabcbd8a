"""Retention policy of checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.discovery import list_checkpoints, step_of
from megagrow.checkpoint.manifest import has_right_sizes, parse_manifest
from megagrow.checkpoint.removal import remove_unfinished, try_to_remove, warn_kept
from megagrow.common.background import BackgroundCall
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
    directory: Path, retention: Retention, is_valid: Callable[[Path], bool | None]
) -> list[Path]:
    """Return the checkpoints that the policy does not keep, oldest first.

    `is_valid` returns True for a valid checkpoint, False for a damaged one, and None for one that
    was not verified. Only valid ones count for `keep_last`; as long as there are fewer, only older
    damaged ones are superfluous. Checkpoints newer than the valid ones are never included, as their
    damage has not been examined.
    """
    found = list_checkpoints(directory)
    last: list[Path] = []
    for path in reversed(found):
        if len(last) < retention.keep_last and is_valid(path):
            last.append(path)
    older = found[: found.index(last[-1])] if last else []
    if len(last) < retention.keep_last:
        older = [path for path in older if is_valid(path) is False]
    return [path for path in older if not _is_kept(path, retention)]


def prune_checkpoints(
    directory: Path, retention: Retention, is_valid: Callable[[Path], bool | None]
) -> None:
    """Remove checkpoints outside the policy, and leftovers of crashes; called by rank 0.

    What cannot be removed is logged once and tried again by the next call. `is_valid` is that of
    `superfluous`.
    """
    try:
        for path in superfluous(directory, retention, is_valid):
            try_to_remove(path)
        remove_unfinished(directory)
    except (OSError, InputError) as error:
        warn_kept(directory, error)


class Pruner:
    """Retention of the checkpoints of a running job, on rank 0.

    A checkpoint counts for `keep_last` once every byte of it was read: when the run resumed from
    it, or after it was written. The oldest one that counts is read again during each save, before
    an older one is removed. All this is distributed over the ranks and runs in the background.
    """

    def __init__(self, directory: Path, retention: Retention) -> None:
        self._directory, self._retention = directory, retention
        self._results: dict[Path, bool] = {}
        self._removing: BackgroundCall[None] | None = None

    def record(self, path: Path, valid: bool) -> None:
        """Record the result of a verification."""
        self._results[path] = valid

    def due(self, step: int) -> list[Path]:
        """Return the checkpoints to be verified while that of `step` is written."""
        others = [
            path
            for path in reversed(list_checkpoints(self._directory))
            if step_of(path) != step and self._results.get(path) is not False
        ]
        counted = others[: self._retention.keep_last - 1]
        return sorted({*(p for p in counted if p not in self._results), *counted[-1:]})

    def start(self) -> None:
        """Remove checkpoints outside the policy, as `prune_checkpoints`, in the background.

        A checkpoint has one file per rank, and the other ranks would wait for their removal.
        """
        self.wait()
        self._removing = BackgroundCall(self._prune, name="pruning")
        self._removing.start()

    def wait(self) -> None:
        """Wait for the removal; required before any other access to the directory."""
        if self._removing is not None:
            removing, self._removing = self._removing, None
            removing.result()

    def _prune(self) -> None:
        prune_checkpoints(self._directory, self._retention, self._is_valid)

    def _is_valid(self, path: Path) -> bool | None:
        return has_right_sizes(path) if self._results.get(path) else self._results.get(path)


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
    return every is not None and step_of(path) % every == 0 and has_right_sizes(path)
