"""Remove and replace checkpoint folders: links are not followed, files of others are kept.

Temporary names: `step-N.tmp` is being written, `step-N.old.tmp` is being replaced by it, and
`step-N.removed.tmp` is being removed. A number before `.tmp` avoids an occupied name.
"""

import logging
import os
import re
from contextlib import suppress
from itertools import count
from pathlib import Path

from megagrow.checkpoint.discovery import unfinished
from megagrow.checkpoint.manifest import (
    MANIFEST_FILE,
    SHARD_NAME,
    OtherFormat,
    has_right_sizes,
    parse_manifest,
)
from megagrow.common.atomic_files import (
    discard,
    first_free,
    free_staging,
    make_folder,
    publish,
    remove,
    replaced_path,
)
from megagrow.common.log_setup import warn_once
from megagrow.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

_NFS_FILE = re.compile(r"\.nfs[0-9a-f]+")
"""A file that was removed on NFS while a process had it open."""


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, or a link to one but not its target.

    It is renamed first, so that a crash leaves no partial checkpoint. Raises OSError, and
    CheckpointError for anything but a checkpoint in this version's format.
    """
    _check_own(path)
    with suppress(FileNotFoundError):  # another process removes the same checkpoint
        discard(path, path)


def try_to_remove(path: Path) -> None:
    """Remove a checkpoint. A failure is logged once; the next prune tries again."""
    try:
        remove_checkpoint(path)
    except (OSError, InputError) as error:
        warn_kept(path, error)


def hide_checkpoint(path: Path) -> None:
    """Rename a checkpoint, so that no run resumes from it; the next save removes it.

    Folders with other contents are kept. Raises OSError.
    """
    try:
        _check_own(path)
    except CheckpointError as error:
        warn_kept(path, error)
    else:
        path.rename(free_staging(path, ".removed"))


def remove_unfinished(directory: Path) -> None:
    """Remove leftovers of unfinished saves and removals. No save may be in progress.

    Those that cannot be removed are logged once. Raises OSError if an interrupted replacement
    cannot be completed.
    """
    finish_replacements(directory)
    for path in unfinished(directory):
        try:
            _check_own(path)
            remove(path)
        except (OSError, InputError) as error:
            warn_kept(path, error)


def publish_checkpoint(partial: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name. Raises OSError.

    It replaces a checkpoint of that name: a damaged one, or one from before a rewind. Anything else
    of that name is renamed.
    """
    try:
        _check_own(final)
    except CheckpointError as error:
        kept = first_free(final.with_name(f"{final.name}.kept.{number}") for number in count(1))
        logger.warning("%s; renamed it to %s", error, kept.name)
        final.rename(kept)
    publish(partial, final)


def finish_replacements(directory: Path) -> None:
    """Complete replacements that a crash interrupted between their two renames. Raises OSError.

    The new checkpoint gets the final name if it is complete, otherwise the old one. Raises
    ResourceError if the directory is a link without target.
    """
    if directory.is_symlink():
        make_folder(directory)
    leftovers = unfinished(directory)
    for old in leftovers:
        final = old.with_name(old.name.partition(".")[0])
        if old == replaced_path(final) and not os.path.lexists(final):
            written = re.compile(rf"{final.name}(\.\d+)?\.tmp")
            new = [p for p in leftovers if written.fullmatch(p.name) and has_right_sizes(p)]
            (new[0] if new else old).rename(final)


def warn_kept(path: Path, error: Exception) -> None:
    """Log once per checkpoint that it cannot be removed."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    name = path.name.partition(".")[0]
    warn_once(
        logger,
        f"{path.parent}/{name}",
        f"checkpoint {path} cannot be removed ({reason}); trying again at each save",
    )


def _check_own(path: Path) -> None:
    """Raise CheckpointError unless a path is free, a link, or a checkpoint in this version's
    format, complete or not. Raises OSError."""
    if path.is_symlink() or not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a checkpoint but a file; move it elsewhere")
    for entry in path.iterdir():
        known = entry.name == MANIFEST_FILE or SHARD_NAME.fullmatch(entry.name)
        removed = _NFS_FILE.fullmatch(entry.name)
        if not (known or removed) or (entry.is_dir() and not entry.is_symlink()):
            raise CheckpointError(
                f"{path}: {entry.name} is not a file of a checkpoint; move it elsewhere"
            )
    try:
        parse_manifest(path)
    except OtherFormat:
        raise
    except CheckpointError:  # damaged or incomplete
        pass
