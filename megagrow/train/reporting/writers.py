"""Destinations of metrics records, the curves that they show, and the TensorBoard writer."""

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megagrow.errors import unwritable

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


CURVES = {
    "train": ("loss", "z_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes"),
    "validation": ("loss", "losses"),
    "evaluation": ("results", "average"),
    "growth": ("loss_before", "loss_after"),
}
"""Kind of a record -> fields that are shown as curves; metrics.jsonl has all fields."""


def curves(record: Record) -> dict[str, float]:
    """Return the numbers of a record that are shown, by `kind/field` or `kind/field/task/...`."""
    kind = record["kind"]
    fields = {key: record[key] for key in CURVES.get(kind, ()) if key in record}
    return dict(_numbers(kind, fields))


def texts(record: Record) -> dict[str, str]:
    """Return the texts of a record that are shown: samples and growths."""
    if record["kind"] == "samples":
        samples = enumerate(record["samples"])
        return {f"samples/{i}": sample["prompt"] + sample["text"] for i, sample in samples}
    if record["kind"] == "growth":
        return {"growth/operator": f"{record['operator']}, stage {record['stage']} begins"}
    return {}


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{place}/{key}", inner)
    elif isinstance(value, int | float):
        yield place, float(value)


class TensorBoardTracker:
    """Curves and texts in `directory`/tensorboard, one event per record.

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
                again = (_event(kept) for kept in self._kept if kept["step"] >= purge)
                events += [event for event in again if event is not None]
            self._purge, self._kept = None, []
        if event := _event(record):
            events.append(event)
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


def _event(record: Record) -> Any:
    """Return the TensorBoard event of a record, None if none of it is shown."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=x) for tag, x in curves(record).items()]
    values += [_text_value(tag, text) for tag, text in texts(record).items()]
    return Event(step=record["step"], summary=Summary(value=values)) if values else None


def _text_value(tag: str, text: str) -> Any:
    """Return a value of TensorBoard's text plugin.

    The plugin renders Markdown: the text is indented as a code block, which is shown verbatim.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    code = "".join(f"    {line}\n" for line in text.splitlines())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(dtype=DT_STRING, string_val=[code.encode()], tensor_shape=shape),
    )


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
