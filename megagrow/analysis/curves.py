"""Load a run directory: losses against FLOPs, tokens and seconds, growths, metrics and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from megagrow.analysis.flop_accounting import Account, Setting, cumulative_flops, read_setting
from megagrow.analysis.run_metrics import (
    RunMetrics,
    Samples,
    Score,
    read_run_metrics,
    read_samples,
    read_scores,
)
from megagrow.analysis.run_origin import RunOrigin, read_origin
from megagrow.analysis.run_records import (
    check_records,
    last_of,
    latest_record,
    of_kind,
    train_records,
    validation_records,
)
from megagrow.analysis.speedup import LossCurve
from megagrow.common.untrusted_values import Tally, problems_of_values
from megagrow.errors import DataError
from megagrow.evaluation.results_store import read_stored, stored_files
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics
from megagrow.train.reporting.writers import Record

SMOOTHING = 0.05
"""Window of the moving average of training losses, as a fraction of the run's tokens."""


@dataclass(frozen=True, slots=True)
class Series:
    """Training or validation loss of a run: columns of equal length, one row per measurement.

    All costs are cumulative and include the base of a grown model.
    """

    tokens: tuple[int, ...]
    flops: tuple[float, ...]
    """By the paper's formula, 6 N per token."""
    flops_true: tuple[float, ...]
    """FLOPs of all matrix products, attention included."""
    seconds: tuple[float, ...]
    loss: tuple[float, ...]
    """Nats per token."""

    def curve(self) -> LossCurve:
        """Return the loss against `flops`. Raises ValueError if there are no measurements."""
        return LossCurve(self.flops, self.loss)


@dataclass(frozen=True, slots=True)
class Growth:
    """Position of a growth in the run."""

    stage: int
    """Index of the stage it starts, from 0."""
    tokens: int
    flops: float
    flops_true: float
    seconds: float
    operator: str | None
    """Operator name, its parts joined by +; None if it is not recorded."""


@dataclass(frozen=True, slots=True)
class RunCurves:
    """Curves and measurements of a run up to its latest record."""

    directory: Path
    name: str
    seed: int
    parameters: tuple[int, ...]
    """Number of parameters of each stage's model."""
    step: int
    planned_steps: int
    finished: bool
    """True if the run has ended after all planned steps."""
    tokens: int
    flops: float
    """Total so far, 6 N per token."""
    flops_true: float
    """Total so far, attention included."""
    seconds: float
    """Time of steps, growths and checkpoints."""
    train: Series
    """Smoothed by `smooth`."""
    train_unsmoothed: tuple[float, ...]
    """Losses of the points of `train` without smoothing."""
    validation: Series
    """Loss on the first validation set."""
    validation_sets: Mapping[str, Series]
    """Loss on each validation set by name, the first one included."""
    growths: tuple[Growth, ...]
    metrics: RunMetrics
    scores: tuple[Score, ...]
    """Evaluations during the run and of its checkpoints; may be empty."""
    samples: Samples | None
    """Latest samples; None if there are none."""
    setting: Setting | None
    """None if the run directory has no config.yaml."""
    origin: RunOrigin

    @property
    def has_full_cost(self) -> bool:
        """True if the run contains the full training cost of its model, as far as is known.

        False for runs that start from a model (`init_from`) or fine-tune one; their FLOPs are not
        compared.
        """
        return self.setting is None or self.setting.has_full_cost

    @property
    def grown(self) -> bool:
        """True if the run is compared as a grown run."""
        return self.has_full_cost and bool(self.growths)

    @property
    def from_scratch(self) -> bool:
        """True if the run is compared as a run from scratch."""
        return self.has_full_cost and not self.growths

    def charged_flops(self, tokens: Sequence[int]) -> tuple[float, ...] | None:
        """Return the cumulative FLOPs, by the paper's charge, at token counts of the run.

        See `flop_accounting`. Return None if the run has no config.yaml.
        """
        if self.setting is None:
            return None
        starts = (0, *(growth.tokens for growth in self.growths))
        stages = (0, *(growth.stage for growth in self.growths))  # others keep the model
        charges = [self.setting.charges[stage] for stage in stages]
        return tuple(cumulative_flops(at, starts, charges) for at in tokens)

    def curve(self, series: Series, account: Account) -> LossCurve | None:
        """Return a series of the run against FLOPs by an account, or None if it is unknown."""
        if account == "flops_charged":
            flops = self.charged_flops(series.tokens)
        else:
            flops = series.flops if account == "flops" else series.flops_true
        return None if flops is None else LossCurve(flops, series.loss)


def load_curves(directory: Path) -> RunCurves:
    """Load the finished run in `directory`.

    Raises InputError if there is no run, the run is unfinished or has no finite loss, or a record
    is malformed.
    """
    run = load_any_curves(directory, read_metrics(directory / METRICS_FILE))
    if not run.finished:
        raise DataError(f"{directory}: the run is not finished; resume it until it ends")
    return run


def load_any_curves(directory: Path, records: Sequence[Record]) -> RunCurves:
    """Return the curves of the run in `directory`, finished or not, from its records.

    Raises InputError if a record is malformed or there is no finite loss.
    """
    path = directory / METRICS_FILE
    try:
        return _curves(directory, path, records)
    except ValidationError as error:
        problem = problems_of_values(error)
        raise DataError(f"{path}: a record is malformed ({problem})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a record is malformed ({error!r})") from error


def _curves(directory: Path, path: Path, records: Sequence[Record]) -> RunCurves:
    first = last_of(records, "start")
    if first is None:
        raise DataError(f"{path}: the start of the run is not recorded; wait for it")
    start = _Start.model_validate(first)
    check_records(path, records, len(start.parameters))
    latest, trained = latest_record(records), train_records(records)
    assert latest is not None
    train = smooth(trained, latest["tokens"])
    validation = {name: _series(each) for name, each in validation_records(records).items()}
    return RunCurves(
        directory=directory,
        name=start.name,
        seed=start.seed,
        parameters=start.parameters,
        step=latest["step"],
        planned_steps=start.run_steps,
        finished=latest["kind"] == "end" and latest["step"] >= start.run_steps,
        tokens=latest["tokens"],
        flops=latest["flops"],
        flops_true=latest["flops_true"],
        seconds=latest["elapsed_seconds"],
        train=train,
        train_unsmoothed=tuple(record["loss"] for record in trained),
        validation=next(iter(validation.values()), _series([])),
        validation_sets=validation,
        growths=tuple(map(_growth, of_kind(records, "growth"))),
        metrics=read_run_metrics(trained),
        scores=read_scores(of_kind(records, "evaluation"), _stored_results(directory)),
        samples=read_samples(last_of(records, "samples")),
        setting=read_setting(directory, _changes(records)),
        origin=read_origin(directory),
    )


def _growth(record: Record) -> Growth:
    return Growth(
        record["stage"],
        record["tokens"],
        record["flops"],
        record["flops_true"],
        record["elapsed_seconds"],
        _text(record.get("operator")),
    )


def _changes(records: Sequence[Record]) -> list[list[object]]:
    """Return step, key and old value of each change of the configuration during the run.

    Those at step 0 are the differences from the source of `init_from`.
    """
    return [
        [record["step"], change["key"], change["old"]]
        for record in of_kind(records, "config_change")
        for change in record["changes"]
        if record["step"]
    ]


class _Start(BaseModel):
    """Fields of a start record."""

    name: str
    seed: int
    parameters: tuple[Tally, ...] = Field(min_length=1)
    run_steps: Tally


def _stored_results(directory: Path) -> list[Record]:
    return [read_stored(path) for path in stored_files(directory)]


def smooth(records: Sequence[Record], run_tokens: int, share: float = SMOOTHING) -> Series:
    """Return the training loss averaged over the last `share` of the run's tokens at each point.

    The window never crosses a growth, so the jump there stays visible and a stage's first point is
    not averaged. Records are weighted equally.
    """
    first, means = 0, []
    sums = list(accumulate((record["loss"] for record in records), initial=0.0))
    for index, record in enumerate(records):
        window_start = record["tokens"] - share * run_tokens
        while first < index and (
            records[first]["tokens"] <= window_start or records[first]["stage"] != record["stage"]
        ):
            first += 1
        means.append((sums[index + 1] - sums[first]) / (index + 1 - first))
    return _series(records, means)


def _series(records: Sequence[Record], losses: Sequence[float] | None = None) -> Series:
    return Series(
        tokens=tuple(record["tokens"] for record in records),
        flops=tuple(float(record["flops"]) for record in records),
        flops_true=tuple(float(record["flops_true"]) for record in records),
        seconds=tuple(float(record["elapsed_seconds"]) for record in records),
        loss=tuple(losses if losses is not None else (r["loss"] for r in records)),
    )


def _text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"{value!r:.60} is not a text")
    return value
