"""Which checkpoints a run keeps, and how the others go."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.files import list_checkpoints, step_of, unfinished
from megagrow.checkpoint.manifest import Manifest, parse_manifest, read_manifest
from megagrow.common.atomic_files import staging_folder
from megagrow.errors import InputError


@dataclass(frozen=True)
class Retention:
    """What is kept for good: the newest whole ones, and these."""

    keep_last: int
    """How many of the newest; damaged ones do not count."""
    keep_every: int | None = None
    """Those whose step is a multiple of it."""
    protected: bool = True
    """Those that say of themselves that they are protected."""


def superfluous(
    directory: Path, retention: Retention, read: Callable[[Path], Manifest] = read_manifest
) -> list[Path]:
    """The checkpoints that need not be kept, oldest first; `read` says which ones are whole.

    None that is newer than the newest whole ones: what is damaged there was not looked into yet.
    None at all if none is whole.
    """
    found = list_checkpoints(directory)
    last: list[Path] = []
    for path in reversed(found):
        if len(last) < retention.keep_last and _is_whole(path, read):
            last.append(path)
    older = found[: found.index(last[-1])] if last else []
    return [path for path in older if not _is_kept(path, retention)]


def prune_checkpoints(directory: Path, retention: Retention) -> None:
    """Removes what need not be kept, and what crashes left; called by rank 0."""
    for path in superfluous(directory, retention):
        remove_checkpoint(path)
    remove_unfinished(directory)


def remove_checkpoint(path: Path) -> None:
    """First it is no checkpoint any more, then it is gone: a crash in between leaves no half of
    one."""
    doomed = staging_folder(path)
    path.rename(doomed)
    _remove(doomed)


def remove_unfinished(directory: Path) -> None:
    """Removes what was left by saves that came to no end. No save may be in progress."""
    for path in unfinished(directory):
        _remove(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # someone at the command line removes the same
        shutil.rmtree(path)


def _is_whole(path: Path, read: Callable[[Path], Manifest]) -> bool:
    try:
        read(path)
    except InputError:
        return False
    return True


def _is_kept(path: Path, retention: Retention) -> bool:
    """Whether one is kept for ever; a damaged one only if it still says that it is protected."""
    try:
        protected = parse_manifest(path).protected is not None
    except InputError:
        return False
    if protected and retention.protected:
        return True
    every = retention.keep_every
    return every is not None and step_of(path) % every == 0 and _is_whole(path, read_manifest)
