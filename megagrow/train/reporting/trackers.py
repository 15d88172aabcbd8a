"""Trackers that a run configures: TensorBoard, and Weights & Biases (W&B)."""

import logging
import uuid
from typing import Any

from megagrow.common.atomic_files import write_text
from megagrow.config.schema import RunConfig
from megagrow.errors import ResourceError
from megagrow.train.reporting.writers import Record, TensorBoardTracker, Tracker, curves

logger = logging.getLogger(__name__)

AXES = ("tokens", "flops", "elapsed_seconds")
"""Counters that W&B charts may use as their x axis instead of the step."""

SAMPLE_COLUMNS = ("step", "prompt", "text")


def open_trackers(run: RunConfig) -> list[Tracker]:
    """Return the trackers of a run. Raises ResourceError if wandb is required but missing."""
    trackers: list[Tracker] = []
    if run.logging.wandb_project is not None:
        trackers.append(WandbTracker(run))
    if run.logging.tensorboard:
        trackers.append(TensorBoardTracker(run.output_dir))
    return trackers


class WandbTracker:
    """W&B run with the resolved config; continued after a resume under the id in wandb.id.

    W&B drops records of steps that it already has. After a resume from an earlier checkpoint or a
    rewind, the tracker therefore rewinds the W&B run, which W&B permits for some accounts only.
    Otherwise the undone records stay, and new ones appear from the next step on.
    """

    _run: Any
    _first: int
    """First step that W&B accepts."""
    _last: int
    """Last step that W&B has, -1 for none."""

    def __init__(self, run: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ResourceError(
                "logging.wandb_project is set but wandb is missing: pip install 'megagrow[wandb]'"
            ) from error
        self._wandb: Any = wandb
        self._config = run
        self._id_file = run.output_dir / "wandb.id"
        if not self._id_file.exists():
            self._new_id()
        self._continue()

    def truncate_after(self, step: int, kept: list[Record]) -> None:
        """Rewind the W&B run to `step` if it has later records; start another one from step -1."""
        if self._last <= step:
            return
        self._run.finish()
        if step < 0:
            self._new_id()
            self._continue()
            return
        try:
            self._open(resume_from=f"{self._id}?_step={step}")
        except self._wandb.Error as error:
            logger.warning(
                "W&B cannot rewind run %s to step %d (%s); it keeps the records up to step %d and "
                "drops repeated steps",
                self._id,
                step,
                error,
                self._last,
            )
            self._continue()

    def write(self, record: Record) -> None:
        step = record["step"]
        if step < self._first:
            return
        row: dict[str, Any] = curves(record)
        if record["kind"] == "samples":
            data = [[step, sample["prompt"], sample["text"]] for sample in record["samples"]]
            row["samples"] = self._wandb.Table(columns=[*SAMPLE_COLUMNS], data=data)
        if row:
            self._run.log(row | {axis: record[axis] for axis in AXES}, step=step)
            self._first = self._last = step

    def close(self) -> None:
        self._run.finish()

    @property
    def _id(self) -> str:
        return self._id_file.read_text(encoding="ascii")

    def _new_id(self) -> None:
        write_text(self._id_file, uuid.uuid4().hex)

    def _continue(self) -> None:
        try:
            self._open(id=self._id, resume="allow")
        except self._wandb.Error as error:
            raise ResourceError(f"logging.wandb_project: W&B cannot start: {error}") from error

    def _open(self, **which: str) -> None:
        run, settings = self._config, self._config.logging
        self._run = self._wandb.init(
            project=settings.wandb_project,
            name=run.name,
            group=settings.wandb_group,
            tags=settings.wandb_tags,
            config=run.model_dump(mode="json"),
            allow_val_change=True,  # a resumed run may change keys
            dir=str(run.output_dir),
            **which,
        )
        self._first = self._run.step
        self._last = self._first - 1
