"""TensorBoard and Weights & Biases writers.

Both show each number of a record as a curve `kind/field` over the step.
"""

import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megagrow.common.atomic_files import write_text
from megagrow.errors import ResourceError, unwritable

Record = dict[str, Any]


class Tracker(Protocol):
    """Destination of metrics records."""

    def write(self, record: Record) -> None:
        """Write one record."""

    def truncate_after(self, step: int, kept: list[Record]) -> None:
        """Remove the records of later steps: the run resumes at `step`, and `kept` are all records
        that stay."""

    def close(self) -> None:
        """Flush buffered records."""


def _scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a record by `kind/field` or `kind/field/field`, without the step,
    which is the x axis."""
    fields = {key: value for key, value in record.items() if key != "step"}
    return dict(_numbers(record["kind"], fields))


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{place}/{key}", inner)
    elif isinstance(value, int | float):
        yield place, float(value)


class TensorBoardTracker:
    """Scalars in `directory`/tensorboard, one event per record.

    TensorBoard's own writer is not used, because its thread cannot report a full disk. A file is
    created at the first record after a start, a resume or a rewind. It begins with an event that
    hides the events of its step and later in earlier files, followed by the kept ones of them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "tensorboard"
        self._purge: int | None = None
        self._kept: list[Record] = []
        self._path: Path | None = None

    def truncate_after(self, step: int, kept: list[Record]) -> None:
        # The step itself is hidden too: it may have records from before and after a growth.
        hidden = max(step, 0)
        self._purge = hidden if self._purge is None else min(hidden, self._purge)
        self._kept, self._path = kept, None

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        events = []
        if self._path is None:
            self._path = _next_file(self._directory)
            events.append(Event(file_version="brain.Event:2"))
            purge = self._purge
            if purge is not None:
                begin = SessionLog(status=SessionLog.START)
                events.append(Event(step=purge, session_log=begin))
                events += [_event(kept) for kept in self._kept if kept["step"] >= purge]
            self._purge, self._kept = None, []
        self._append(self._path, [*events, _event(record)])

    def close(self) -> None:
        """Do nothing: the file is complete after each record."""

    def _append(self, path: Path, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                for event in events:
                    event.wall_time = time.time()
                    RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            raise unwritable(path, error) from error


def _event(record: Record) -> Any:
    """Return the TensorBoard event of a record."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=x) for tag, x in _scalars(record).items()]
    return Event(step=record["step"], summary=Summary(value=values))


def _next_file(directory: Path) -> Path:
    """Return the name of a new event file.

    TensorBoard reads the files in the order of their names, which begin with the time. The clock
    may have been set back, so that the new name follows the newest of the existing ones.
    """
    names = (_EVENT_FILE.match(path.name) for path in directory.glob("events.out.tfevents.*"))
    existing = [int(name[1]) for name in names if name is not None]
    stamp = max([int(time.time()), *(stamp + 1 for stamp in existing)])
    return directory / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{10})\.", re.ASCII)


class WandbTracker:
    """W&B run, continued after a resume; its id is stored next to metrics.jsonl."""

    def __init__(self, directory: Path, project: str, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ResourceError(
                "logging.wandb_project is set but wandb is missing: pip install 'megagrow[wandb]'"
            ) from error
        kept = directory / "wandb.id"
        if not kept.exists():
            write_text(kept, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=name,
            id=kept.read_text(encoding="ascii"),
            resume="allow",
            dir=str(directory),
        )

    def truncate_after(self, step: int, kept: list[Record]) -> None:
        """Do nothing: W&B cannot delete, and ignores steps that it has already received."""

    def write(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
