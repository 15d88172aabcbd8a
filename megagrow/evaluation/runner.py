"""Runs lm-eval on a model, and its results as plain numbers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.evaluator import evaluate as run_lm_eval

from megagrow.evaluation.lm import Evaluated, evaluated
from megagrow.evaluation.model import load
from megagrow.evaluation.results_store import standing
from megagrow.evaluation.tasks import Tasks, load_tasks
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import Topology

ACCURACIES = ("acc", "acc_norm")

Results = dict[str, Any]
"""{"results": {task: {metric: value, metric_stderr: value}}, "average": value or None}."""


def evaluate(
    model: Evaluated,
    tasks: Tasks,
    limit: int | None,
    begin: Callable[[str], None] = lambda task: None,
) -> Results:
    """The metrics of each task and the average of the accuracies; all ranks together.

    `limit` is the number of documents of each task, None for all; `begin` hears of each task.
    InputError where a task asks what cannot be answered.
    """
    results = {}
    for name, task in tasks.items():
        begin(name)
        with _without_bars():
            found = run_lm_eval(
                lm=model,
                task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,  # it would fork processes for the error of a perplexity
                log_samples=False,
            )
        results[name] = _plain(found["results"][name], found["n-samples"][name]["effective"])
    return {"results": results, "average": average(results)}


def evaluate_checkpoint(
    checkpoint: Path,
    names: tuple[str, ...],
    topology: Topology,
    *,
    data_dir: Path | None,
    batch_size: int,
    limit: int | None,
    tokenizer: str | None,
    dtype: str | None,
) -> Results:
    """Evaluate a checkpoint, a run's newest or a Hugging Face folder on tasks. Collective.

    Returns the results together with `checkpoint`, `limit`, and the position of its run.
    """
    tasks = run_on_all_ranks(lambda: load_tasks(names, data_dir))
    loaded = load(checkpoint, topology, tokenizer, dtype)
    results = evaluate(evaluated(loaded, topology, batch_size), tasks, limit)
    about = {"checkpoint": str(loaded.path), **standing(loaded.run), "limit": limit}
    return {**about, **results}


@contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval shows one for the making of each task's requests, and cannot be told not to."""
    shown = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown


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
