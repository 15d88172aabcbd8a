"""Where metrics go besides the file: TensorBoard and Weights & Biases.

Both show each number of a record as a curve `kind/field` over the step.
"""

import uuid
from pathlib import Path
from typing import Any, Protocol

from megagrow.errors import InputError

Record = dict[str, Any]


class Tracker(Protocol):
    """Something that shows records, one after another."""

    def write(self, record: Record) -> None:
        """Shows one record."""

    def truncate_after(self, step: int) -> None:
        """Forgets what was shown for later steps: the run goes on from there."""

    def close(self) -> None:
        """Finishes what is still buffered."""


def _scalars(record: Record) -> dict[str, float]:
    """The numbers of a record as `kind/field`, without the step, which is the x axis."""
    return {
        f"{record['kind']}/{key}": float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


class TensorBoardTracker:
    """Scalars in `directory`/tensorboard. The file is opened at the first record, for only then is
    it known from which step on the events of an earlier process are to be hidden."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "tensorboard"
        self._purge: int | None = None
        self._writer: Any = None

    def truncate_after(self, step: int) -> None:
        self._purge = step + 1

    def write(self, record: Record) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=self._purge)
        for tag, value in _scalars(record).items():
            self._writer.add_scalar(tag, value, global_step=record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """A W&B run, gone on with after a resume; its id is kept beside the metrics."""

    def __init__(self, directory: Path, project: str, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                "logging.wandb_project is set but wandb is missing: pip install 'megagrow[wandb]'"
            ) from error
        kept = directory / "wandb.id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex, encoding="ascii")
        self._run = wandb.init(
            project=project,
            name=name,
            id=kept.read_text(encoding="ascii"),
            resume="allow",
            dir=str(directory),
        )

    def truncate_after(self, step: int) -> None:
        """W&B cannot forget: it ignores steps that it has already seen, which are the same ones."""

    def write(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
