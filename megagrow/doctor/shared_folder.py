"""Whether a folder is the same on all hosts, and whether each of them can write to it."""

import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from megagrow.doctor.rendezvous import Meeting

SEEN_SECONDS = 15.0
"""How long what one host has written may take until the others see it: network file systems keep
what they know of a folder for some seconds."""


@dataclass(frozen=True)
class FolderView:
    """What one rank has found; those that are not the first of their host look at nothing."""

    looked: bool
    trouble: str | None = None
    """Why it cannot be written to."""
    unseen: tuple[int, ...] = ()
    """First ranks of other hosts that have written what is not to be seen here."""


def look_at_folder(meeting: Meeting, folder: Path, first_of_host: bool) -> list[FolderView]:
    """By rank what it has found; all ranks together. Leaves nothing but the folder behind."""
    rank = meeting.launch.rank
    token = meeting.share("folder's token", uuid.uuid4().hex)[0]
    inside = folder / f".megagrow-doctor-{token}"
    try:
        trouble = _write(inside / str(rank)) if first_of_host else None
        wrote = meeting.share("folder written", first_of_host and trouble is None)
        writers = {other for other, done in enumerate(wrote) if done}
        unseen = sorted(writers - _seen(inside, writers)) if rank in writers else []
        found = meeting.share("folder seen", [first_of_host, trouble, unseen])
    finally:
        if first_of_host:  # on each host, as it may be another folder there
            shutil.rmtree(inside, ignore_errors=True)
    return [FolderView(looked, why, tuple(others)) for looked, why, others in found]


def _write(path: Path) -> str | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("seen", encoding="ascii")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _seen(inside: Path, writers: set[int]) -> set[int]:
    """The ranks whose files are there, when all of them are or time is up."""
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        seen = {int(path.name) for path in inside.iterdir()}
        if seen >= writers or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)
