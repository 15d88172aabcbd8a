"""What a run measured beside its loss: gradient norms, throughput, memory, and accuracies."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.train.reporting.writers import Record


@dataclass(frozen=True, slots=True)
class Gauge:
    """One quantity over a run: equally long columns, without the steps that did not tell it."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Gauges:
    """What every recorded step tells."""

    grad_norm: Gauge
    """Global norm before clipping."""
    tokens_per_second: Gauge
    memory_bytes: Gauge
    """Peak of the first rank's device, or of its process on a CPU."""
    mfu: Gauge
    """Share of what the devices could compute; empty where that is not known."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one evaluation found, and where the run stood then."""

    step: int
    tokens: int
    flops: float
    seconds: float
    average: float | None
    """Mean accuracy of its tasks, where it was told."""
    results: dict[str, dict[str, float]]
    """Task -> metric -> value; accuracies are shares of 1."""


def read_gauges(trained: Sequence[Record]) -> Gauges:
    """The gauges of train records, in their order. Raises KeyError or ValueError for other ones."""
    return Gauges(**{name: _gauge(trained, name) for name in Gauges.__dataclass_fields__})


def read_scores(evaluations: Sequence[Record], kept: Sequence[Record] = ()) -> tuple[Score, ...]:
    """What evaluation records say, and what `megagrow eval` has `kept` of the run, by step.

    Where there is both of the same step that which was kept counts: somebody asked for it. What is
    no number (an error that was not estimated) is left out. Raises KeyError, TypeError or
    ValueError for records that were not written so.
    """
    found = {record["step"]: record for record in (*evaluations, *kept)}
    return tuple(_score(found[step]) for step in sorted(found))


def _score(record: Record) -> Score:
    return Score(
        step=record["step"],
        tokens=record["tokens"],
        flops=float(record["flops"]),
        seconds=float(record["elapsed_seconds"]),
        average=_number(record.get("average")),
        results={task: _metrics(found) for task, found in _mapping(record["results"]).items()},
    )


def _gauge(records: Sequence[Record], name: str) -> Gauge:
    told = [record for record in records if record.get(name) is not None]
    return Gauge(
        tuple(record["tokens"] for record in told), tuple(float(record[name]) for record in told)
    )


def _metrics(found: object) -> dict[str, float]:
    values = {name: _number(value) for name, value in _mapping(found).items()}
    return {name: value for name, value in values.items() if value is not None}


def _mapping(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no mapping")
    return value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
