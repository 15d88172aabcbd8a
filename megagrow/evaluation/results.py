"""Runs lm-eval on a model, and its results as plain numbers."""

import math
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as run_lm_eval

from megagrow.evaluation.lm import Evaluated
from megagrow.evaluation.tasks import load_tasks

ACCURACIES = ("acc", "acc_norm")

Results = dict[str, Any]
"""{"results": {task: {metric: value, metric_stderr: value}}, "average": value or None}."""


def evaluate(
    model: Evaluated, tasks: tuple[str, ...], data_dir: Path | None, limit: int | None
) -> Results:
    """The metrics of each task and the average of the accuracies; all ranks together.

    `limit` is the number of documents of each task, None for all. InputError as `load_tasks`.
    """
    loaded = load_tasks(tasks, data_dir)
    found = run_lm_eval(
        lm=model,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=0,  # it would fork processes for the error of a perplexity
        log_samples=False,
    )
    results = {
        task: _plain(metrics, found["n-samples"][task]["effective"])
        for task, metrics in found["results"].items()
        if task in found["n-samples"]
    }
    return {"results": results, "average": average(results)}


def average(results: dict[str, dict[str, float]]) -> float | None:
    """The plain mean over tasks of the accuracy, normalised by length where a task has both; None
    without any. Du et al. 2024 average the same seven tasks, and do not say which accuracy."""
    found = [
        metrics.get("acc_norm", metrics.get("acc"))
        for metrics in results.values()
        if "acc" in metrics
    ]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None


def _plain(metrics: dict[str, Any], samples: int) -> dict[str, float]:
    """lm-eval's `acc,none` as `acc`; accuracies with the standard error of a share."""
    out: dict[str, float] = {}
    for name, value in metrics.items():
        metric, comma, _ = name.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        out[metric] = float(value)
        if metric in ACCURACIES and samples > 1:
            out[f"{metric}_stderr"] = math.sqrt(value * (1 - value) / (samples - 1))
    return out
