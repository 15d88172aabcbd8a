"""Evaluation of the model in training, in place: no weight is moved or copied."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.config.sections import EvaluationConfig
from megagrow.evaluation.decoder import TokenChoice, TokenDecoder
from megagrow.evaluation.lm import LMAdapter
from megagrow.evaluation.logprobs import ModelScorer, TokenQuery
from megagrow.evaluation.runner import Results, evaluate
from megagrow.evaluation.stage_model import StageModel
from megagrow.evaluation.tasks import load_tasks
from megagrow.evaluation.tokenizer import CachedTokenizer, EvalTokenizer, open_tokenizer
from megagrow.model.masks import Masks
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import make_topology
from megagrow.train.stage import Stage


class OnlineEvaluation:
    """Evaluation of the stages of a run: an `evaluator.Evaluation`.

    The constructor is collective and raises InputError as `evaluator.open_evaluation`.
    """

    def __init__(self, run: RunConfig, config: EvaluationConfig, device: torch.device) -> None:
        self._config = config
        self._tasks = run_on_all_ranks(partial(load_tasks, tuple(config.tasks), config.data_dir))
        self._tokenizer = run_on_all_ranks(partial(_open_tokenizer, run))
        length = min(stage.model.max_position_embeddings for stage in run.stages)
        check_tasks(self._tasks, config, self._tokenizer, length, device)

    def __call__(self, stage: Stage, masks: Masks | None, begin: Callable[[str], None]) -> Results:
        model = LMAdapter(
            ModelScorer(StageModel(stage, masks), stage.topology),
            self._tokenizer,
            stage.topology,
            stage.config.model.max_position_embeddings,
            self._config.batch_size,
        )
        with stage.evaluating():
            return evaluate(model, self._tasks, self._config.limit, begin)


def _open_tokenizer(run: RunConfig) -> EvalTokenizer:
    return CachedTokenizer(open_tokenizer(str(run.data.tokenizer), run.stages[0].model.vocab_size))


class StubScorer:
    """`TokenScorer` without a model: every token has probability 1, every text ends at once.

    It is its own `TokenDecoder`.
    """

    def __init__(self, eos_id: int) -> None:
        self._eos_id = eos_id

    def decode(self, prompts: list[list[int]]) -> TokenDecoder:
        """Return the decoder of all texts."""
        return self

    def next_tokens(self, choices: Sequence[TokenChoice | None]) -> list[int]:
        """Return the end-of-text token for each text."""
        return [self._eos_id] * len(choices)

    def keep(self, rows: Sequence[int]) -> None:
        """Do nothing: there is no state."""

    def scores(
        self, sequences: list[list[int]], query: TokenQuery
    ) -> tuple[list[float], list[bool]]:
        """Return zeros, and True for each token."""
        count = len(query.labels)
        return [0.0] * count, [True] * count

    def finish(self) -> None:
        """Do nothing: there are no passes."""


def check_tasks(
    tasks: Any,
    config: EvaluationConfig,
    tokenizer: EvalTokenizer,
    max_length: int,
    device: torch.device,
) -> None:
    """Run all requests of the tasks on every rank. Collective.

    `max_length` is the shortest context length, in tokens, of the run's models. Raises InputError
    if a task contains a request that cannot be answered.
    """
    topology = make_topology(dist.get_world_size(), device)  # one data-parallel rank: no sharing
    model = LMAdapter(
        StubScorer(tokenizer.eos_id), tokenizer, topology, max_length, config.batch_size
    )
    run_on_all_ranks(lambda: evaluate(model, tasks, config.limit))
