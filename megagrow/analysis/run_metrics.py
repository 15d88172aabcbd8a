"""Metrics of a run other than the loss: throughput, memory, accuracies and sampled texts."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.common.untrusted_values import as_amount, as_tally, as_value
from megagrow.train.reporting.writers import Record


@dataclass(frozen=True, slots=True)
class MetricSeries:
    """One metric over a run: columns of equal length, without the steps that did not record it."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """Metrics of the recorded training steps."""

    grad_norm: MetricSeries
    """Global norm before clipping."""
    tokens_per_second: MetricSeries
    memory_bytes: MetricSeries
    """Peak memory of rank 0's device, or of its process on a CPU."""
    mfu: MetricSeries
    """Fraction of the devices' peak FLOP/s; empty if the peak is unknown."""


@dataclass(frozen=True, slots=True)
class Score:
    """Results of one evaluation and the run's counters at that time."""

    step: int
    tokens: int
    flops: float
    seconds: float
    average: float | None
    """Mean accuracy of the tasks; None if it was not recorded."""
    results: dict[str, dict[str, float]]
    """Task -> metric -> value; accuracies are fractions."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Texts generated during a run."""

    step: int
    texts: tuple[tuple[str, str], ...]
    """Prompt and continuation of each sample."""


def read_samples(record: Record | None) -> Samples | None:
    """Return the samples of a samples record, None without one.

    Raises KeyError, TypeError or ValueError for a malformed record.
    """
    if record is None:
        return None
    samples = [_mapping(sample) for sample in record["samples"]]
    texts = tuple((_as_text(sample["prompt"]), _as_text(sample["text"])) for sample in samples)
    return Samples(as_tally(record["step"]), texts)


def read_run_metrics(trained: Sequence[Record]) -> RunMetrics:
    """Read the metrics of train records, in order.

    Raises KeyError or ValueError for malformed records.
    """
    return RunMetrics(
        **{name: _metric_series(trained, name) for name in RunMetrics.__dataclass_fields__}
    )


def read_scores(evaluations: Sequence[Record], stored: Sequence[Record] = ()) -> tuple[Score, ...]:
    """Return the scores of evaluation records and of results stored by `megagrow eval`, by step.

    Stored results take precedence over the record of the same step. Values that are not numbers (an
    error that was not estimated) are omitted. Raises KeyError, TypeError or ValueError for
    malformed records.
    """
    by_step = {record["step"]: record for record in (*evaluations, *stored)}
    return tuple(_score(by_step[step]) for step in sorted(by_step))


def _score(record: Record) -> Score:
    return Score(
        step=as_tally(record["step"]),
        tokens=as_tally(record["tokens"]),
        flops=as_amount(record["flops"]),
        seconds=as_amount(record["elapsed_seconds"]),
        average=_number(record.get("average")),
        results={task: _numbers(values) for task, values in _mapping(record["results"]).items()},
    )


def _metric_series(records: Sequence[Record], name: str) -> MetricSeries:
    present = [record for record in records if record.get(name) is not None]
    return MetricSeries(
        tuple(record["tokens"] for record in present),
        tuple(as_value(record[name]) for record in present),
    )


def _numbers(metrics: object) -> dict[str, float]:
    values = {name: _number(value) for name, value in _mapping(metrics).items()}
    return {name: value for name, value in values.items() if value is not None}


def _mapping(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a mapping")
    return value


def _as_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is not a text")
    return value


def _number(value: object) -> float | None:
    return as_value(value) if isinstance(value, int | float) else None
