"""Run lm-eval on a model and return its results as plain numbers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.evaluator import evaluate as run_lm_eval

from megagrow.errors import InputError
from megagrow.evaluation.lm import LMAdapter, wrap_model
from megagrow.evaluation.model import load_model
from megagrow.evaluation.results_store import run_counters
from megagrow.evaluation.tasks import Tasks, load_tasks
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import Topology

ACCURACIES = ("acc", "acc_norm")

Results = dict[str, Any]
"""{"results": {task: {metric: value, metric_stderr: value}}, "average": value or None}."""


def evaluate(
    model: LMAdapter,
    tasks: Tasks,
    limit: int | None,
    begin: Callable[[str], None] = lambda task: None,
) -> Results:
    """Return the metrics of each task and the average accuracy. Collective.

    `limit` is the number of documents per task, None for all. `begin` is called with the name of
    each task before it starts. Raises InputError if a task contains a request that cannot be
    answered.
    """
    results = {}
    for name, task in tasks.items():
        begin(name)
        report = _report(model, name, task, limit)
        results[name] = _plain(report["results"][name], report["n-samples"][name]["effective"])
    return {"results": results, "average": average(results)}


def _report(model: LMAdapter, name: str, task: Any, limit: int | None) -> dict[str, Any]:
    """Return lm-eval's results of one task; an InputError names the task."""
    try:
        with _without_bars():
            results: dict[str, Any] = run_lm_eval(
                lm=model,
                task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,  # bootstrapping forks processes
                log_samples=False,
            )
    except InputError as error:
        raise type(error)(f"task {name}: {error}") from error
    return results


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

    Return the results with `checkpoint`, `limit`, and the step, tokens, FLOPs and elapsed seconds
    of its run.
    """
    tasks = run_on_all_ranks(lambda: load_tasks(names, data_dir))
    loaded = load_model(checkpoint, topology, tokenizer, dtype)
    results = evaluate(wrap_model(loaded, topology, batch_size), tasks, limit)
    about = {"checkpoint": str(loaded.path), **run_counters(loaded.run), "limit": limit}
    return {**about, **results}


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disable the progress bar of lm-eval's request building, which has no option for it."""
    original = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(original, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = original


def average(results: dict[str, dict[str, float]]) -> float | None:
    """Return the unweighted mean accuracy over the tasks, or None if no task has an accuracy.

    The length-normalized accuracy `acc_norm` is used if a task has one. Du et al. 2024 average the
    same seven tasks but do not specify which accuracy.
    """
    accuracies = [
        metrics.get("acc_norm", metrics.get("acc"))
        for metrics in results.values()
        if "acc" in metrics
    ]
    values = [value for value in accuracies if value is not None]
    return sum(values) / len(values) if values else None


def _plain(metrics: dict[str, Any], samples: int) -> dict[str, float]:
    """Rename lm-eval's `acc,none` to `acc` and add the binomial standard error of accuracies."""
    out: dict[str, float] = {}
    for name, value in metrics.items():
        metric, comma, _ = name.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        out[metric] = float(value)
        if metric in ACCURACIES and samples > 1:
            out[f"{metric}_stderr"] = math.sqrt(value * (1 - value) / (samples - 1))
    return out
