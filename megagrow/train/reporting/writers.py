"""TensorBoard and Weights & Biases writers.

Both show each number of a record as a curve `kind/field` over the step.
"""

import os
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

    def truncate_after(self, step: int) -> None:
        """Remove the records of later steps: the run resumes at `step`."""

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

    TensorBoard's own writer is not used, because its thread cannot report a full disk. The file is
    created at the first record, when the step is known from which events of an earlier process are
    hidden.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "tensorboard"
        self._purge: int | None = None
        self._path: Path | None = None

    def truncate_after(self, step: int) -> None:
        self._purge = step + 1

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        if self._path is None:
            name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
            self._path = self._directory / name
            events.append(Event(file_version="brain.Event:2"))
            if self._purge is not None:
                begin = SessionLog(status=SessionLog.START)
                events.append(Event(step=self._purge, session_log=begin))
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in _scalars(record).items()]
        events.append(Event(step=record["step"], summary=Summary(value=values)))
        self._append(self._path, events)

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

    def truncate_after(self, step: int) -> None:
        """Do nothing: W&B cannot delete, and ignores steps that it has already received."""

    def write(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
