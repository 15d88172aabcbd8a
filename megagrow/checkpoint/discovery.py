"""Search for the newest valid checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megagrow.checkpoint.files import list_checkpoints
from megagrow.checkpoint.manifest import Manifest, verify_checkpoint
from megagrow.errors import CheckpointError, InputError

FoundCheckpoint = tuple[Path, Manifest]
Content = TypeVar("Content")


def newest_valid(directory: Path, say: Callable[[str], None]) -> FoundCheckpoint | None:
    """Return the newest valid checkpoint under a directory, None if there is no checkpoint at all.

    One process reads every byte. A damaged checkpoint is reported through `say` and skipped.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    return last_valid(directory, list_checkpoints(directory), verify_checkpoint, say)


def last_valid(
    directory: Path,
    paths: list[Path],
    verify: Callable[[Path], Manifest],
    say: Callable[[str], None],
) -> FoundCheckpoint | None:
    """Return the last of the paths that `verify` accepts, as `newest_valid` does."""
    problems: list[str] = []
    found = next(valid_checkpoints(reversed(paths), verify, say, problems), None)
    if found is None and problems:
        raise CheckpointError(f"no checkpoint under {directory} is valid: {problems[0]}")
    return found


def valid_checkpoints(
    paths: Iterable[Path],
    read: Callable[[Path], Content],
    say: Callable[[str], None],
    problems: list[str] | None = None,
) -> Iterator[tuple[Path, Content]]:
    """Yield the checkpoints that `read` accepts; report the others through `say` and skip them.

    `problems` collects the messages of the errors.
    """
    for path in paths:
        try:
            content = read(path)
        except InputError as error:
            say(f"passed over a checkpoint: {error}")
            if problems is not None:
                problems.append(str(error))
        else:
            yield path, content
