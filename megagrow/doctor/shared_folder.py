"""Check that a folder is shared by all hosts and writable on each of them."""

import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from megagrow.doctor.rendezvous import Rendezvous

VISIBILITY_SECONDS = 15.0
"""Maximum delay until a file written by one host is visible on the others: network file systems
cache directory entries for some seconds."""


@dataclass(frozen=True)
class FolderView:
    """Result of the check on one rank; only the first rank of each host checks the folder."""

    write_error: str | None = None
    """Reason why the folder is not writable; None if it is, or was not checked."""
    unseen: tuple[int, ...] = ()
    """First ranks of other hosts whose files are not visible here."""


def check_folder(rendezvous: Rendezvous, folder: Path, first_of_host: bool) -> list[FolderView]:
    """Check the folder and return the results by rank. Collective.

    The folder is created if it does not exist; the files written into it are removed.
    """
    rank = rendezvous.launch.rank
    token = rendezvous.all_gather("folder token", uuid.uuid4().hex)[0]
    inside = folder / f".megagrow-doctor-{token}"
    try:
        write_error = _write(inside / str(rank)) if first_of_host else None
        wrote = rendezvous.all_gather("folder written", first_of_host and write_error is None)
        writers = {other for other, done in enumerate(wrote) if done}
        unseen = sorted(writers - _visible_ranks(inside, writers)) if rank in writers else []
        results = rendezvous.all_gather("folder read", [write_error, unseen])
    finally:
        if first_of_host:  # on each host, because the folder may not be shared
            shutil.rmtree(inside, ignore_errors=True)
    return [FolderView(error, tuple(others)) for error, others in results]


def _write(path: Path) -> str | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("seen", encoding="ascii")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _visible_ranks(inside: Path, writers: set[int]) -> set[int]:
    """Return the ranks whose files are visible, once all are or after `VISIBILITY_SECONDS`."""
    deadline = time.monotonic() + VISIBILITY_SECONDS
    while True:
        seen = {int(path.name) for path in inside.iterdir()}
        if seen >= writers or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)
