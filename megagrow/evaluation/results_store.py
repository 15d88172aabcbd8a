"""Results of `megagrow eval` that stay in the directory of the checkpoint's run, for its report.

RUN/evaluations/step-N.json holds what `--output` writes. It says where the run stood, as the
records of evaluations during the run do.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagrow.checkpoint.files import checkpoint_name, list_checkpoints
from megagrow.common.atomic_files import write_text
from megagrow.common.json_text import finite, read_json
from megagrow.errors import DataError, unwritable
from megagrow.train.reporting.metrics import METRICS_FILE
from megagrow.train.train_state import RunState

FOLDER = "evaluations"

Kept = dict[str, Any]
"""{"checkpoint", "step", "tokens", "flops", "elapsed_seconds", "limit", "results", "average"}."""


def standing(run: dict[str, Any] | None) -> dict[str, Any]:
    """What had been used up when a checkpoint was saved, from what it says of its run; empty where
    it comes from none. InputError if that is damaged."""
    if run is None:
        return {}
    counters = RunState.from_json(run).counters
    return {
        name: getattr(counters, name) for name in ("step", "tokens", "flops", "elapsed_seconds")
    }


def run_of(checkpoint: Path) -> Path | None:
    """The directory of the run that a checkpoint was saved by and still lies in; else None."""
    folder = checkpoint.resolve().parent
    here = checkpoint.resolve() in list_checkpoints(folder)
    return folder.parent if here and (folder.parent / METRICS_FILE).is_file() else None


def keep(found: Kept, run: Path, average: Callable[[dict[str, Any]], float | None]) -> Path:
    """Writes results into a run's directory, and returns the file's path.

    Other tasks that were evaluated on the same checkpoint before, with the same limit, stay; the
    average is taken over all of them. InputError if the file cannot be read or written.
    """
    path = run / FOLDER / f"{checkpoint_name(found['step'])}.json"
    if path.exists():
        before = read_kept(path)
        if all(before.get(key) == found[key] for key in ("limit", "tokens", "elapsed_seconds")):
            results = {**before["results"], **found["results"]}
            found = {**found, "results": results, "average": average(results)}
    write(path, found)
    return path


def write(path: Path, found: Kept) -> None:
    """Write results as a JSON file atomically. Raises ResourceError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(finite(found), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def kept_files(run: Path) -> list[Path]:
    """The files of a run's directory, by their steps."""
    return sorted((run / FOLDER).glob("step-*.json"))


def forget_after(run: Path, step: int) -> None:
    """Removes the results of checkpoints later than `step`; with step -1 all of them.

    For a run that goes on from there, or begins anew: so are its records. OSError if it cannot.
    """
    for path in kept_files(run):
        if step < 0 or path.stem > checkpoint_name(step):
            path.unlink()


def read_kept(path: Path) -> Kept:
    """The results in a file. InputError, naming it, if it holds none."""
    found = read_json(path)
    counts = [type(found.get(key)) is int for key in ("step", "tokens")]
    numbers = [isinstance(found.get(key), int | float) for key in ("flops", "elapsed_seconds")]
    results = found.get("results")
    whole = isinstance(results, dict) and all(isinstance(one, dict) for one in results.values())
    if not (all(counts) and all(numbers) and whole):
        raise DataError(
            f"{path}: not as megagrow eval has written it; evaluate again, or remove it"
        )
    return found
