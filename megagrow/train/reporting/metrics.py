"""What a run writes down about itself: metrics.jsonl always, TensorBoard and W&B where asked.

metrics.jsonl holds one JSON object per line, each written in one piece and flushed: `kind`, the
counters (step, tokens, FLOPs ...), then the kind's own fields. A resumed run first takes out what
the checkpoint does not know of, so that its file becomes that of an undisturbed run.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megagrow.common.atomic_files import atomic_file
from megagrow.common.json_text import finite, parse_json
from megagrow.config.flops import parameters
from megagrow.config.schema import RunConfig
from megagrow.errors import DataError, unwritable
from megagrow.train.reporting.writers import Record, TensorBoardTracker, Tracker, WandbTracker
from megagrow.train.run_position import run_steps, run_tokens

METRICS_FILE = "metrics.jsonl"
RecordKind = Literal[
    "start", "train", "validation", "evaluation", "growth", "checkpoint", "rewind", "end"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step as it was measured; sums are over all ranks."""

    stage: int
    loss: float
    """Mean over the step's tokens, in nats."""
    lr: float
    grad_norm: float | None
    """Global norm before clipping; None where the engine does not tell."""
    tokens: int
    flops: float
    """By the paper's account (`config.parameters.paper_flops_per_token`)."""
    flops_true: float
    """With attention (`flops.flops_per_token`)."""
    seconds: float
    memory_bytes: int
    """Peak of this rank's device, or of its process on a CPU."""
    position: int
    """Where in the training stream the batch began."""
    skipped: bool = False
    """Loss or gradient were not finite: nothing was updated."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What a run has used up since its first token, all stages together. Kept in checkpoints."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    flops_true: float = 0.0
    elapsed_seconds: float = 0.0
    """Steps, growth and checkpoints; not validation or evaluation, nor work that a crash undid."""
    lost_seconds: float = 0.0
    """The part of it that went into growth and checkpoints."""
    growth_tokens: int = 0
    """The part of `tokens` that growths read themselves, to train what they choose or to measure
    (LiGO, probing); no part of any stage."""
    growth_flops: float = 0.0
    """The part of `flops` that went into that."""
    growth_flops_true: float = 0.0
    """The part of `flops_true` that went into that."""
    skipped_steps: int = 0
    """The part of `step` that changed nothing, as loss or gradient were not finite."""
    rewinds: int = 0
    """How often the run went back to a checkpoint. What it undid counts nowhere else."""

    def after_step(self, measure: StepMetrics) -> "Counters":
        """The counters when the step is done."""
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
        """The counters when a growth itself has used so much, by both accounts of FLOPs."""
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
        """The counters when `seconds` went into a growth or a checkpoint."""
        return replace(
            self,
            elapsed_seconds=self.elapsed_seconds + seconds,
            lost_seconds=self.lost_seconds + seconds,
        )


def train_fields(measure: StepMetrics, peak_flops: float | None) -> Record:
    """A train record's own fields; `peak_flops` is that of all devices together, if known."""
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
    }


def start_fields(run: RunConfig) -> Record:
    """A start record's own fields: what the run is going to be."""
    return {
        "name": run.name,
        "seed": run.seed,
        "parameters": [parameters(stage.model) for stage in run.stages],
        "run_steps": run_steps(run),
        "run_tokens": run_tokens(run),
    }


class MetricsLog:
    """Writes the records of one run. Only rank 0 has one.

    A half-written last line, left by a killed run, is taken out when the log is opened. Raises
    InputError where the file is damaged or cannot be written, or wandb is not installed.
    """

    def __init__(
        self, directory: Path, tensorboard: bool, wandb_project: str | None, run_name: str
    ) -> None:
        self.path = directory / METRICS_FILE
        directory.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _rewrite(self.path, read_metrics(self.path))
        self._trackers: list[Tracker] = []
        if wandb_project is not None:
            self._trackers.append(WandbTracker(directory, wandb_project, run_name))
        if tensorboard:
            self._trackers.append(TensorBoardTracker(directory))

    def write(self, kind: RecordKind, counters: Counters, **fields: Any) -> None:
        """Appends one record; numbers that are not finite become null, JSON having no NaN."""
        record: Record = finite({"kind": kind, **asdict(counters), **fields})
        try:
            with self.path.open("a", encoding="ascii") as file:
                file.write(_line(record))
        except OSError as error:
            raise unwritable(self.path, error) from error
        for tracker in self._trackers:
            tracker.write(record)

    def truncate_after(self, step: int, stage: int | None = None, rewinds: int = 0) -> None:
        """Takes out what was recorded later than a checkpoint; `start` records stay.

        The checkpoint was saved after `step` steps, in stage `stage`: at the step of a growth the
        stage tells what came before it from what came after; so do the `rewinds` of a run that
        went back. Call with step -1 to begin anew.
        """
        if self.path.exists():
            known = read_metrics(self.path)
            kept = [record for record in known if not _later(record, step, stage, rewinds)]
            _rewrite(self.path, kept)
        for tracker in self._trackers:
            tracker.truncate_after(step)

    def close(self) -> None:
        """Finishes TensorBoard's and W&B's files; metrics.jsonl is complete after each write."""
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, without a last line that was cut short.

    Raises InputError for a missing file, and for any other line that is not a record, by number.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the directory of a run that was started")
    *lines, tail = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            raise DataError(f"{path} line {number}: not a metrics record; repair or remove it")
        records.append(record)
    last = _parse(tail)
    return records if last is None else [*records, last]


def _parse(line: bytes) -> Record | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    counts = [record.get("step"), record.get("tokens"), record.get("stage", 0)]
    numbers = all(type(count) is int for count in counts) and isinstance(
        record.get("flops"), int | float
    )
    return record if numbers else None


def _later(record: Record, step: int, stage: int | None, rewinds: int) -> bool:
    if record["kind"] == "start":
        return False
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
