"""Evaluation during training: validation loss, samples and lm-eval tasks.

lm-eval is an optional dependency. It is imported only if the run file has an `evaluation` section.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from megagrow.config.schema import EvaluationConfig, RunConfig
from megagrow.errors import ResourceError
from megagrow.model.masks import Masks
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.train.data_setup import Inputs
from megagrow.train.fault_tolerance.watchdog import Watchdog
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.stage import Stage, masks_now
from megagrow.train.step import mean_loss
from megagrow.train.train_state import RunState

Evaluation = Callable[[Stage, Masks | None, Callable[[str], None]], dict[str, Any]]
"""Collective function (stage, masks of this rank, callback that receives each task's name before
the task starts) -> results, in the format of `runner.evaluate`."""


class Evaluator:
    """Evaluation of a run's model between steps; results go to the run logger.

    The constructor is collective and raises InputError, before training starts, if a requirement of
    the samples or of the evaluation is missing. All methods are collective.
    """

    def __init__(self, run: RunConfig, inputs: Inputs, device: torch.device) -> None:
        self._inputs = inputs
        self._tasks = open_evaluations(run, device)
        self._samples: Callable[[Stage, Masks | None], list[dict[str, str]]] | None = None
        if run.samples is not None:
            run_on_all_ranks(require_transformers)
            from megagrow.evaluation.samples import TrainingSamples

            self._samples = TrainingSamples(run, run.samples)

    def validate(
        self, run: RunConfig, stage: Stage, state: RunState, log: RunLogger, watchdog: Watchdog
    ) -> None:
        """Compute the validation losses, if the run has validation sets."""
        step, masks = state.counters.step, masks_now(run, stage, state.stage_tokens)
        losses = {}
        for name, each in self._inputs.stages[stage.index].validation.items():
            watchdog.beat(f"the validation after step {step}", long=True)
            losses[name] = mean_loss(stage, each.reader, each.sequences, masks)
        if losses:
            log.validation(state, losses)

    def sample(
        self, run: RunConfig, stage: Stage, state: RunState, log: RunLogger, watchdog: Watchdog
    ) -> None:
        """Generate the samples, if the run has them."""
        step, masks = state.counters.step, masks_now(run, stage, state.stage_tokens)
        if self._samples is not None:
            watchdog.beat(f"the samples after step {step}", long=True)
            log.samples(state, self._samples(stage, masks))

    def evaluate(
        self, run: RunConfig, stage: Stage, state: RunState, log: RunLogger, watchdog: Watchdog
    ) -> None:
        """Run the lm-eval tasks, if the run has them."""
        step, masks = state.counters.step, masks_now(run, stage, state.stage_tokens)

        def begin(task: str) -> None:
            watchdog.beat(f"the evaluation on {task} after step {step}", long=True)

        tasks = self._tasks[stage.index]
        if tasks is not None:
            log.evaluation(state, tasks(stage, masks, begin))


def open_evaluations(run: RunConfig, device: torch.device) -> list[Evaluation | None]:
    """Return the evaluation of each stage, None for a stage without one. Collective.

    Stages whose evaluations differ in their interval only share one. Tasks are loaded and their
    requests are tokenized once, here. Raises InputError, before training starts, if lm-eval, a
    task, its data or the tokenizer is missing, or if a task contains a request that cannot be
    answered.
    """
    if all(stage.evaluation is None for stage in run.stages):
        return [None] * len(run.stages)
    run_on_all_ranks(require_lm_eval)
    from megagrow.evaluation.online import OnlineEvaluation

    opened: dict[str | None, Evaluation | None] = {None: None}
    keys = [_without_interval(each.evaluation) for each in run.stages]
    for key, stage in zip(keys, run.stages, strict=True):
        if key not in opened and stage.evaluation is not None:
            opened[key] = OnlineEvaluation(run, stage.evaluation, device)
    return [opened[key] for key in keys]


def _without_interval(evaluation: EvaluationConfig | None) -> str | None:
    return None if evaluation is None else evaluation.model_dump_json(exclude={"interval"})


def require_lm_eval() -> None:
    """Raise InputError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError("evaluation needs lm-eval: pip install megagrow[eval]")


def require_transformers() -> None:
    """Raise InputError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ResourceError("generating text needs transformers: pip install megagrow[hf]")
