"""Evaluation while a run trains, as the run sees it: nothing of lm-eval is imported without it."""

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
"""(stage, this rank's masks, what hears the name of each task that begins): the results, as
`results.evaluate` gives them. All ranks together."""


def open_evaluation(run: RunConfig, device: torch.device) -> Evaluation | None:
    """What evaluates the models of a run; None where the run asks for none. All ranks together.

    The tasks are loaded, and all that they ask is tokenised, here and once. InputError, before
    anything is trained, where lm-eval, a task, its data or the tokenizer is missing, or a task asks
    what cannot be done.
    """
    if run.evaluation is None:
        return None
    run_on_all_ranks(need_lm_eval)
    from megagrow.evaluation.online import LiveEvaluation

    return LiveEvaluation(run, run.evaluation, device)


def need_lm_eval() -> None:
    """InputError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError("evaluation needs lm-eval: pip install megagrow[eval]")
