"""A whole evaluation without a model, before a run begins: what is wrong with the tasks is seen
then, and the texts become tokens."""

from typing import Any

import torch
import torch.distributed as dist

from megagrow.config.sections import EvaluationConfig
from megagrow.evaluation.lm import Evaluated
from megagrow.evaluation.logprobs import Asked
from megagrow.evaluation.runner import evaluate
from megagrow.evaluation.tokenizer import Texts
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import destroy_topology, make_topology


class NoModel:
    """Answers as nobody would ask for: every token is certain, and every text ends at once."""

    def __init__(self, eos_id: int) -> None:
        self._eos_id = eos_id

    def best(self, sequences: list[list[int]]) -> list[int]:
        """The end of each text."""
        return [self._eos_id] * len(sequences)

    def scores(self, sequences: list[list[int]], asked: Asked) -> tuple[list[float], list[bool]]:
        """Zeros."""
        count = len(asked.labels)
        return [0.0] * count, [True] * count

    def finish(self) -> None:
        """Nothing: there are no passes."""


def rehearse(
    tasks: Any, config: EvaluationConfig, texts: Texts, max_length: int, device: torch.device
) -> None:
    """Asks all that the tasks ask, on every rank; collective. `max_length` is what the model with
    the least reads. InputError where a task asks what cannot be answered."""
    topology = make_topology(dist.get_world_size(), device)  # nothing is shared out
    model = Evaluated(NoModel(texts.eos_id), texts, topology, max_length, config.batch_size)
    run_on_all_ranks(lambda: evaluate(model, tasks, config.limit))
    destroy_topology(topology)
