"""Data points for `megagrow fit` from the directories of finished runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megagrow.analysis.curves import RunCurves, load_curves
from megagrow.config.load import load_run
from megagrow.errors import DataError
from megagrow.fits.data import Data, IsoPoint, ScalingPoint
from megagrow.model.layers.flops import non_embedding_parameters

Choice = Literal["base_tokens", "factor"]


@dataclass(frozen=True, slots=True)
class _Grown:
    """A run with one growth."""

    directory: Path
    curves: RunCurves
    parameters: int
    """Non-embedding parameters of the last stage's model."""
    choice: float
    """d in tokens, or g."""


def iso_points(
    directories: Sequence[Path], budgets: Sequence[float], choice: Choice
) -> Data[IsoPoint]:
    """Return the smoothed training losses of runs with one growth at each budget in FLOPs.

    N is the number of non-embedding parameters of the last stage's model, d the tokens before the
    growth, and g the ratio of N after and before the growth, rounded to two decimals. The loss is
    interpolated linearly in log FLOPs. Runs from scratch, and budgets before a run's growth or
    after its end, are excluded with a note. Raises InputError if a directory is not a finished run
    with at most one growth, and if no point is left.
    """
    points, notes = [], []
    for directory in directories:
        run = _load_grown(directory, choice)
        if run is None:
            notes.append(f"{directory}: trained from scratch, excluded")
            continue
        for budget in budgets:
            loss = _loss_at(run.curves, budget)
            if loss is None:
                notes.append(
                    f"{directory}: the budget {budget:.3g} FLOPs is not between its growth and its "
                    "end, excluded"
                )
                continue
            points.append(IsoPoint(run.parameters, budget, run.choice, loss, run.curves.seed))
    if not points:
        raise DataError(f"no run with one growth reaches any of the budgets: {notes[0]}")
    return Data(_source_name(directories), tuple(points), tuple(notes))


def scaling_points(directories: Sequence[Path]) -> Data[ScalingPoint]:
    """Return the final loss of each run.

    It is the validation loss if all runs have one, else the smoothed training loss. FLOPs are the
    total of all stages, base included. Raises InputError if a directory contains no finished run,
    or a run without its model's full cost.
    """
    runs = [_load_complete(directory) for directory in directories]
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
    return Data(_source_name(directories), points, (note,))


def _source_name(directories: Sequence[Path]) -> str:
    return f"{directories[0]}" + (f" and {len(directories) - 1} more" if directories[1:] else "")


def _load_complete(directory: Path) -> RunCurves:
    run = load_curves(directory)
    if not run.has_full_cost:
        raise DataError(
            f"{directory}: the run starts from a model (init_from) or fine-tunes one "
            "(objective: sft), so it lacks the full training cost of its model; exclude it"
        )
    return run


def _load_grown(directory: Path, choice: Choice) -> _Grown | None:
    curves = _load_complete(directory)
    if not curves.growths:
        return None
    if len(curves.growths) > 1:
        raise DataError(
            f"{directory}: the run has {len(curves.growths)} growths; pass runs with at most one"
        )
    path = directory / "config.yaml"
    if not path.is_file():
        raise DataError(f"{path}: no such file; it is needed for the model sizes")
    growth = curves.growths[0]
    stages = load_run(path).stages[growth.stage - 1 : growth.stage + 1]
    small, large = (non_embedding_parameters(stage.model) for stage in stages)
    value = growth.tokens if choice == "base_tokens" else round(large / small, 2)
    return _Grown(directory, curves, large, value)


def _loss_at(run: RunCurves, budget: float) -> float | None:
    """Return the smoothed training loss at `budget`; None before the growth or after the end."""
    first = sum(at <= run.growths[0].tokens for at in run.train.tokens)
    flops, losses = run.train.flops[first:], run.train.loss[first:]
    if not flops or not flops[0] <= budget <= flops[-1]:
        return None
    return float(np.interp(math.log(budget), np.log(flops), losses))
