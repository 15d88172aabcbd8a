"""Points for `megagrow fit` out of the directories of finished runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megagrow.analysis.curves import RunCurves, load_run
from megagrow.config.flops import non_embedding_parameters
from megagrow.config.load import load_run as load_run_file
from megagrow.errors import DataError
from megagrow.fits.data import Data, IsoPoint, ScalingPoint

Choice = Literal["base_tokens", "factor"]


@dataclass(frozen=True, slots=True)
class _Grown:
    """A run that grew once."""

    directory: Path
    curves: RunCurves
    parameters: int
    choice: float


def iso_points(
    directories: Sequence[Path], budgets: Sequence[float], choice: Choice
) -> Data[IsoPoint]:
    """The smoothed training losses of runs that grew once, at each of the `budgets` in FLOPs.

    N is that of the last stage's model, outside its embeddings; d the tokens before the growth; g
    how many times N has become, to two decimals. The loss is linear in log FLOPs between two
    records. Left out, with a note: runs from scratch, and budgets that a run has not yet grown at,
    or ends before. Raises InputError for what is no finished run with at most one growth, and
    where no point is left.
    """
    points, notes = [], []
    for directory in directories:
        run = _grown(directory, choice)
        if run is None:
            notes.append(f"{directory}: from scratch, left out")
            continue
        for budget in budgets:
            loss = _loss_at(run.curves, budget)
            if loss is None:
                notes.append(f"{directory}: after its growth it is never at {budget:.3g} FLOPs")
                continue
            points.append(IsoPoint(run.parameters, budget, run.choice, loss, run.curves.seed))
    if not points:
        raise DataError(f"no run that grew once reaches any of the budgets: {notes[0]}")
    return Data(_named(directories), tuple(points), tuple(notes))


def scaling_points(directories: Sequence[Path]) -> Data[ScalingPoint]:
    """The final loss of each run: of validation if all runs have it, else smoothed of training.

    FLOPs are those of all stages, what the base has cost included. Raises InputError where a
    directory holds no finished run.
    """
    runs = [_whole(directory) for directory in directories]
    validated = all(run.validation.loss for run in runs)
    points = tuple(
        ScalingPoint(
            "grown" if run.growths else "scratch",
            run.flops,
            (run.validation if validated else run.train).loss[-1],
            run.seed,
        )
        for run in runs
    )
    note = f"final {'validation' if validated else 'smoothed training'} losses"
    return Data(_named(directories), points, (note,))


def _named(directories: Sequence[Path]) -> str:
    return f"{directories[0]}" + (f" and {len(directories) - 1} more" if directories[1:] else "")


def _whole(directory: Path) -> RunCurves:
    run = load_run(directory)
    if not run.whole:
        raise DataError(
            f"{directory}: began with a model (init_from) or tunes one (objective: sft), so what "
            "its model has cost is not in it; leave it out"
        )
    return run


def _grown(directory: Path, choice: Choice) -> _Grown | None:
    curves = _whole(directory)
    if not curves.growths:
        return None
    if len(curves.growths) > 1:
        raise DataError(
            f"{directory}: grew {len(curves.growths)} times; give runs that grew at most once"
        )
    path = directory / "config.yaml"
    if not path.is_file():
        raise DataError(f"{path}: no such file; it tells the run's sizes")
    small, large = (non_embedding_parameters(s.model) for s in load_run_file(path).stages)
    found = curves.growths[0].tokens if choice == "base_tokens" else round(large / small, 2)
    return _Grown(directory, curves, large, found)


def _loss_at(run: RunCurves, budget: float) -> float | None:
    """The smoothed training loss at `budget`; None before the growth or after the end."""
    first = sum(at <= run.growths[0].tokens for at in run.train.tokens)
    flops, losses = run.train.flops[first:], run.train.loss[first:]
    if not flops or not flops[0] <= budget <= flops[-1]:
        return None
    return float(np.interp(math.log(budget), np.log(flops), losses))
