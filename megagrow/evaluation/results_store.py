"""Results of `megagrow eval`, stored in the run directory of the checkpoint for the run's report.

RUN/evaluations/step-N.json has the format of `--output`. Like the records of evaluations during the
run, it contains the run's step, tokens, FLOPs and elapsed seconds at the checkpoint.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megagrow.checkpoint.discovery import checkpoint_name, list_checkpoints
from megagrow.common.atomic_files import write_text
from megagrow.common.json_text import format_json, read_json
from megagrow.common.untrusted_values import Amount, Tally, problems_of_values
from megagrow.errors import DataError, unwritable
from megagrow.train.reporting.metrics import METRICS_FILE
from megagrow.train.train_state import RunState

logger = logging.getLogger(__name__)

FOLDER = "evaluations"

StoredResults = dict[str, Any]
"""{"checkpoint", "step", "tokens", "flops", "elapsed_seconds", "limit", "results", "average"}."""


def run_counters(state: RunState | None) -> dict[str, Any]:
    """Return the step, tokens, FLOPs and elapsed seconds at which a checkpoint was saved.

    `state` is its run state; without one the result is empty.
    """
    if state is None:
        return {}
    counters = state.counters
    return {
        name: getattr(counters, name) for name in ("step", "tokens", "flops", "elapsed_seconds")
    }


def find_run(checkpoint: Path) -> Path | None:
    """Return the run directory that contains the checkpoint, or None if there is none."""
    # The folder of checkpoints may be a link; then only the path as given leads to the run.
    for path in (checkpoint.absolute(), checkpoint.resolve()):
        run = path.parent.parent
        if path in list_checkpoints(path.parent) and (run / METRICS_FILE).is_file():
            return run
    return None


def store_results(
    results: StoredResults, run: Path, average: Callable[[dict[str, Any]], float | None]
) -> Path:
    """Write results into a run directory and return the file's path.

    Results of other tasks on the same checkpoint with the same limit are kept; the average is then
    taken over all tasks. Raises InputError if the file cannot be read or written.
    """
    path = run / FOLDER / f"{checkpoint_name(results['step'])}.json"
    if path.exists():
        previous = read_stored(path)
        if all(previous.get(key) == results[key] for key in ("limit", "tokens", "elapsed_seconds")):
            merged = {**previous["results"], **results["results"]}
            results = {**results, "results": merged, "average": average(merged)}
    write_results(path, results)
    return path


def write_results(path: Path, results: StoredResults) -> None:
    """Write results as JSON atomically. Raises ResourceError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, format_json(results))
    except OSError as error:
        raise unwritable(path, error) from error


def stored_files(run: Path) -> list[Path]:
    """Return the result files of a run directory, sorted by step."""
    return sorted((run / FOLDER).glob("step-*.json"))


def remove_stored_after(run: Path, step: int) -> None:
    """Remove the results of checkpoints later than `step`; of all checkpoints if `step` is -1.

    Called when a run resumes from `step` or restarts; its records are truncated the same way. A
    file that cannot be removed is logged.
    """
    for path in stored_files(run):
        if step < 0 or path.stem > checkpoint_name(step):
            try:
                path.unlink()
            except OSError as error:
                logger.warning(
                    "%s: cannot be removed (%s), but its checkpoint was undone; remove it",
                    path,
                    error.strerror,
                )


class _Stored(BaseModel):
    """Values of a result file that are read again."""

    step: Tally
    tokens: Tally
    flops: Amount
    elapsed_seconds: Amount
    results: dict[str, dict[str, Any]]


def read_stored(path: Path) -> StoredResults:
    """Read a result file. Raises InputError, with the path, if it has another format."""
    stored = read_json(path)
    try:
        _Stored.model_validate(stored)
    except ValidationError as error:
        raise DataError(
            f"{path}: not in the format of megagrow eval ({problems_of_values(error)}); evaluate "
            "again or remove the file"
        ) from error
    return stored
