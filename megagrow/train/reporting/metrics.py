"""Metrics of a run: metrics.jsonl, and TensorBoard and W&B if configured.

metrics.jsonl has one JSON object per line, written in one piece and flushed: `kind`, the counters
(step, tokens, FLOPs ...), `time`, then the fields of the kind. A resumed run first removes the
records after its checkpoint, so the file equals that of an undisturbed run, except for times.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, with_config

from megagrow.common.atomic_files import atomic_file, sync
from megagrow.common.json_text import finite, limited_lines, parse_json
from megagrow.common.untrusted_values import Amount, Tally, as_amount, as_tally
from megagrow.config.schema import RunConfig
from megagrow.config.sections import UNNAMED_SET
from megagrow.config.stage_length import run_tokens
from megagrow.errors import DataError, unwritable
from megagrow.model.layers.flops import parameters
from megagrow.train.reporting.writers import Record, Tracker

METRICS_FILE = "metrics.jsonl"
RecordKind = Literal[
    "start",
    "config_change",
    "train",
    "validation",
    "samples",
    "evaluation",
    "growth",
    "stage",
    "checkpoint",
    "rewind",
    "lost",
    "end",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Measurements of one optimizer step; sums are over all ranks."""

    stage: int
    loss: float
    """Mean over the step's tokens, in nats."""
    lr: float
    grad_norm: float | None
    """Global norm before clipping; None if the engine does not provide it."""
    tokens: int
    flops: float
    """By the paper's formula (`model.layers.flops.paper_flops_per_token`)."""
    flops_true: float
    """Including attention (`flops.flops_per_token`)."""
    seconds: float
    memory_bytes: int
    """Peak of this rank's GPU, or of its process on a CPU."""
    position: int
    """Position of the batch's first token in the training stream."""
    skipped: bool = False
    """True if nothing was updated: loss or gradient not finite, or above `guards.skip_step`."""
    z_loss: float | None = None
    """Trained in addition to `loss`; None without `optimizer.z_loss_multiplier`."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class Counters:
    """Totals of a run since its first token, over all stages. Saved in checkpoints."""

    step: Tally = 0
    tokens: Tally = 0
    flops: Amount = 0.0
    flops_true: Amount = 0.0
    elapsed_seconds: Amount = 0.0
    """Steps, growth and checkpoints; without validation, evaluation and work undone by a crash."""
    lost_seconds: Amount = 0.0
    """Part of `elapsed_seconds` spent on growth and checkpoints."""
    growth_tokens: Tally = 0
    """Part of `tokens` read by growths that train (LiGO); belongs to no stage."""
    growth_flops: Amount = 0.0
    """Part of `flops` spent on growths, including operator search and probes."""
    growth_flops_true: Amount = 0.0
    """Part of `flops_true` spent on growths, including operator search and probes."""
    skipped_steps: Tally = 0
    """Part of `step` that was skipped: loss or gradient not finite, or outliers."""
    rewinds: Tally = 0
    """Number of rewinds. Undone steps count in no other field."""

    def after_step(self, measure: StepMetrics) -> "Counters":
        """Return the counters after a step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + measure.tokens,
            flops=self.flops + measure.flops,
            flops_true=self.flops_true + measure.flops_true,
            elapsed_seconds=self.elapsed_seconds + measure.seconds,
            skipped_steps=self.skipped_steps + measure.skipped,
        )

    def after_growth(self, tokens: int, flops: float, flops_true: float) -> "Counters":
        """Return the counters after a growth that trained or measured."""
        return replace(
            self,
            tokens=self.tokens + tokens,
            flops=self.flops + flops,
            flops_true=self.flops_true + flops_true,
            growth_tokens=self.growth_tokens + tokens,
            growth_flops=self.growth_flops + flops,
            growth_flops_true=self.growth_flops_true + flops_true,
        )

    def add_lost_time(self, seconds: float) -> "Counters":
        """Return the counters after `seconds` of growth or checkpointing."""
        return replace(
            self,
            elapsed_seconds=self.elapsed_seconds + seconds,
            lost_seconds=self.lost_seconds + seconds,
        )


def train_fields(measure: StepMetrics, peak_flops: float | None) -> Record:
    """Return the fields of a train record; `peak_flops` is the sum over all devices, if known."""
    return {
        "stage": measure.stage,
        "loss": measure.loss,
        "lr": measure.lr,
        "grad_norm": measure.grad_norm,
        "position": measure.position,
        "skipped": measure.skipped,
        "tokens_per_second": measure.tokens / measure.seconds,
        "mfu": measure.flops_true / measure.seconds / peak_flops if peak_flops else None,
        "memory_bytes": measure.memory_bytes,
        "seconds": measure.seconds,
        **({} if measure.z_loss is None else {"z_loss": measure.z_loss}),
    }


def validation_fields(losses: Mapping[str, float]) -> Record:
    """Return the fields of a validation record, at least one set: `loss` is that of the first.

    `losses` has those of all sets by name; a single set without a name has no such field.
    """
    fields: Record = {"loss": next(iter(losses.values()))}
    return fields if losses.keys() == {UNNAMED_SET} else fields | {"losses": dict(losses)}


def losses_by_set(record: Record) -> Record:
    """Return the losses of a validation record by the name of the set."""
    losses = record.get("losses", {UNNAMED_SET: record["loss"]})
    if not isinstance(losses, dict):
        raise TypeError(f"losses = {losses!r:.60} are not a mapping")
    return losses


def start_fields(run: RunConfig, run_steps: int) -> Record:
    """Return the fields of a start record: the planned run, which ends after `run_steps` steps."""
    return {
        "name": run.name,
        "seed": run.seed,
        "parameters": [parameters(stage.model) for stage in run.stages],
        "run_steps": run_steps,
        "run_tokens": run_tokens(run),
        "logging_interval": run.logging.interval,
    }


class MetricsLog:
    """Writer of the records of one run, on rank 0.

    Opening it removes an incomplete last line, left by a killed run. Raises DataError if the file
    is damaged, ResourceError if it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS_FILE
        directory.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _rewrite(self.path, read_metrics(self.path))
        else:
            self.path.unlink(missing_ok=True)  # a link without target
        self._trackers: Sequence[Tracker] = ()

    def attach(self, trackers: Sequence[Tracker]) -> None:
        """Also write the records that follow to `trackers`, which are closed with this log."""
        self._trackers = (*self._trackers, *trackers)

    def write(self, kind: RecordKind, counters: Counters, **fields: Any) -> None:
        """Append one record; non-finite numbers become null, because JSON has no NaN."""
        record: Record = finite({"kind": kind, **asdict(counters), "time": time.time(), **fields})
        try:
            with self.path.open("a", encoding="ascii") as file:
                file.write(_line(record))
        except OSError as error:
            raise unwritable(self.path, error) from error
        for tracker in self._trackers:
            tracker.write(record)

    def sync(self) -> None:
        """Wait until all records are on the disk (fsync), before a checkpoint of their steps is."""
        if self.path.exists():
            try:
                sync(self.path)
            except OSError as error:
                raise unwritable(self.path, error) from error

    def truncate_after(self, step: int, stage: int | None = None, rewinds: int = 0) -> list[Record]:
        """Remove the records after a checkpoint; `start` records stay. Returns those that are kept.

        Args:
            step: steps of the checkpoint; -1 removes everything.
            stage: stage of the checkpoint, which separates the records before and after a growth
                at the same step.
            rewinds: rewinds of the checkpoint, which separate the records before and after a
                rewind.
        """
        kept: list[Record] = []
        if self.path.exists():
            known = read_metrics(self.path)
            kept = [record for record in known if not _later(record, step, stage, rewinds)]
            _rewrite(self.path, kept)
        for tracker in self._trackers:
            tracker.truncate_after(step, kept)
        return kept

    def close(self) -> None:
        """Close the files of TensorBoard and W&B; metrics.jsonl is complete after each write."""
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a metrics.jsonl, without an incomplete last line.

    Raises DataError for a missing file and for any other line that is not a record, with its
    number. The file is read line by line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the directory of a run that was started")
    records = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(limited_lines(file), start=1):
                record = parse_record(line)
                if record is not None:
                    records.append(record)
                elif line.endswith(b"\n"):
                    raise DataError(
                        f"{path} line {number}: not a metrics record; repair or remove it"
                    )
    except ValueError as error:
        raise DataError(f"{path} {error}; repair or remove it") from error
    return records


def parse_record(line: bytes) -> Record | None:
    """Return the record of a line; None if it is not one or its counters are out of range."""
    try:
        record = parse_json(line)
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            return None
        for count in (record.get("step"), record.get("tokens"), record.get("stage", 0)):
            as_tally(count)
        as_amount(record.get("flops"))
    except ValueError:
        return None
    return record


def _later(record: Record, step: int, stage: int | None, rewinds: int) -> bool:
    if record["kind"] == "start":
        return False
    if record["kind"] == "config_change" and record["step"] == step:
        return True  # written again if the run still differs from the checkpoint
    grown = stage is not None and record.get("stage", stage) > stage
    return bool(grown or record["step"] > step or record.get("rewinds", 0) > rewinds)


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _rewrite(path: Path, records: Iterable[Record]) -> None:
    """Replace the file atomically."""
    try:
        with atomic_file(path) as partial, partial.open("w", encoding="ascii") as file:
            file.writelines(map(_line, records))
    except OSError as error:
        raise unwritable(path, error) from error
