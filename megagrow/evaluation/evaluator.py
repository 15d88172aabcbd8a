"""Evaluation during training: entry point of the training run.

lm-eval is an optional dependency. It is imported only if the run file has an `evaluation` section.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from megagrow.config.schema import RunConfig
from megagrow.errors import ResourceError
from megagrow.model.masks import Masks
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.train.stage import Stage

Evaluation = Callable[[Stage, Masks | None, Callable[[str], None]], dict[str, Any]]
"""Collective function (stage, masks of this rank, callback that receives each task's name before
the task starts) -> results, in the format of `runner.evaluate`."""


def open_evaluation(run: RunConfig, device: torch.device) -> Evaluation | None:
    """Build the evaluation of a run, or return None if the run file has none. Collective.

    Tasks are loaded and their requests are tokenized once, here. Raises InputError, before training
    starts, if lm-eval, a task, its data or the tokenizer is missing, or if a task contains a
    request that cannot be answered.
    """
    if run.evaluation is None:
        return None
    run_on_all_ranks(need_lm_eval)
    from megagrow.evaluation.online import OnlineEvaluation

    return OnlineEvaluation(run, run.evaluation, device)


def need_lm_eval() -> None:
    """Raise InputError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError("evaluation needs lm-eval: pip install megagrow[eval]")
