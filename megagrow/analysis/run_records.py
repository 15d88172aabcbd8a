"""Records of a run in metrics.jsonl: selection by kind, and checks of their order and values."""

from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

from megagrow.common.untrusted_values import as_amount, as_value
from megagrow.errors import DataError
from megagrow.train.reporting.metrics import losses_by_set
from megagrow.train.reporting.writers import Record

MEASURED = ("train", "validation", "growth")
"""Kinds of records whose costs never decrease."""


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """Return the records of a kind, in order."""
    return [record for record in records if record["kind"] == kind]


def validation_records(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the validation records of each set by name, each with `loss` of this set.

    The first set is the first one of the last record. Raises TypeError for malformed losses.
    """
    measured = [(record, losses_by_set(record)) for record in of_kind(records, "validation")]
    names = dict.fromkeys(name for _, losses in reversed(measured) for name in losses)
    return {
        name: [record | {"loss": losses[name]} for record, losses in measured if name in losses]
        for name in names
    }


def train_records(records: Sequence[Record]) -> list[Record]:
    """Return the records of steps that were not skipped."""
    return [record for record in of_kind(records, "train") if not record.get("skipped")]


def last_of(records: Sequence[Record], *kinds: str) -> Record | None:
    """Return the last record of these kinds."""
    return next((record for record in reversed(records) if record["kind"] in kinds), None)


def latest_record(records: Sequence[Record]) -> Record | None:
    """Return the record with the present totals of the run."""
    return last_of(records, *MEASURED, "end")


def check_records(path: Path, records: Sequence[Record], stages: int) -> None:
    """Check the losses, costs and growths of a run with this number of stages.

    Raises DataError if there is no training loss or one is not finite, ValueError for values that
    training does not write.
    """
    _check_losses(path, records)
    _check_costs(records)
    _check_stages(of_kind(records, "growth"), stages)


def _check_losses(path: Path, records: Sequence[Record]) -> None:
    steps = train_records(records)
    if not steps:
        raise DataError(
            f"{path}: no training loss was recorded; wait for the first step, or lower "
            "logging.interval"
        )
    for record in chain(steps, *validation_records(records).values()):
        if record["loss"] is None:
            raise DataError(
                f"{path}: the {record['kind']} loss at step {record['step']} is not finite; "
                "the run diverged, lower its learning rate"
            )
        as_value(record["loss"])


def _check_costs(records: Sequence[Record]) -> None:
    """Raise ValueError unless all costs are in range and never decrease, and there are some.

    The end of an interrupted part includes the time of its last save, which the next part does not.
    """
    costs = ("tokens", "flops", "flops_true", "elapsed_seconds")
    latest = latest_record(records)
    measured = [r for r in records if r["kind"] in MEASURED or r is latest]
    for cost in costs:
        values = [as_amount(record[cost]) for record in measured]
        if any(later < sooner for sooner, later in pairwise(values)):
            raise ValueError(f"{cost} decreases")
        if any(0 < value < 1 for value in values if cost != "elapsed_seconds") or not values[-1]:
            raise ValueError(f"{cost} = {min(values)}")


def _check_stages(growths: Sequence[Record], stages: int) -> None:
    """Raise ValueError unless each growth starts another of the stages, in order."""
    starts = [growth["stage"] for growth in growths]
    if starts != sorted(set(starts)) or any(not 0 < stage < stages for stage in starts):
        raise ValueError(f"growths into the stages {starts!r:.60} of {stages}")
