"""Preflight check of the evaluation: all tasks run against a stub model before training starts.

Errors in the tasks are found then, and the tokenizer's cache is filled.
"""

from typing import Any

import torch
import torch.distributed as dist

from megagrow.config.sections import EvaluationConfig
from megagrow.evaluation.lm import LMAdapter
from megagrow.evaluation.logprobs import TokenQuery
from megagrow.evaluation.runner import evaluate
from megagrow.evaluation.tokenizer import EvalTokenizer
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import destroy_topology, make_topology


class StubScorer:
    """`TokenScorer` without a model: every token has probability 1, every text ends at once."""

    def __init__(self, eos_id: int) -> None:
        self._eos_id = eos_id

    def greedy_tokens(self, sequences: list[list[int]]) -> list[int]:
        """Return the end-of-document token for each sequence."""
        return [self._eos_id] * len(sequences)

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
    destroy_topology(topology)
