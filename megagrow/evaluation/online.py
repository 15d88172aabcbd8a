"""The model that is being trained, evaluated where it lies: no weight is moved or copied."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagrow.config.schema import RunConfig
from megagrow.config.sections import EvaluationConfig
from megagrow.evaluation.lm import Evaluated
from megagrow.evaluation.logprobs import Asked, Scorer
from megagrow.evaluation.runner import Results, evaluate
from megagrow.evaluation.tasks import load_tasks
from megagrow.evaluation.tokenizer import RememberedTexts, Texts, open_texts
from megagrow.model.llama import HeadLoss
from megagrow.model.masks import Masks
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import destroy_topology, make_topology
from megagrow.train.stage import Stage


@dataclass(frozen=True)
class LiveModel:
    """A stage's engine and its masks of now, for `scores.Scorer`; the engine is in evaluation."""

    stage: Stage
    masks: Masks | None

    @property
    def vocab_size(self) -> int:
        return self.stage.config.model.vocab_size

    def pass_through(self, ids: Tensor, head: HeadLoss) -> None:
        """One pass; under ZeRO-3 the other data-parallel ranks make one at the same time."""
        self._anybody(True)
        self._forward(ids, head)

    def finish(self) -> None:
        """Makes passes for nothing as long as others make some: ZeRO-3 gathers weights in each of
        them."""
        while self._anybody(False):
            nothing = torch.zeros(1, 1, dtype=torch.int64, device=self.stage.topology.device)
            self._forward(nothing, _nothing)

    def _forward(self, ids: Tensor, head: HeadLoss) -> None:
        parallel = self.stage.config.parallel
        if parallel.sequence_parallel:  # it cuts sequences into equal parts
            ids = F.pad(ids, (0, -ids.shape[1] % parallel.tensor_model_parallel_size))
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.stage.engine.forward(ids, positions, None, self.masks, head)

    def _anybody(self, working: bool) -> bool:
        """Whether a rank is at a pass on which this one has to work too."""
        topology = self.stage.topology
        if self.stage.config.parallel.zero_stage < 3:
            return working
        vote = torch.tensor([float(working)], device=topology.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=topology.dp_group)
        return vote.item() > 0


def _nothing(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    return hidden_BSD.new_zeros(())


class LiveEvaluation:
    """Evaluates the stages of a run: a `during.Evaluation`.

    Errors: InputError as `during.open_evaluation` says.
    """

    def __init__(self, run: RunConfig, config: EvaluationConfig, device: torch.device) -> None:
        self._config = config
        self._tasks = run_on_all_ranks(partial(load_tasks, tuple(config.tasks), config.data_dir))
        self._texts = run_on_all_ranks(partial(_open_texts, run))
        length = min(stage.model.max_position_embeddings for stage in run.stages)
        rehearse(self._tasks, config, self._texts, length, device)

    def __call__(
        self, stage: Stage, masks: Masks | None, begin: Callable[[str], None]
    ) -> dict[str, Any]:
        stage.engine.train(False)
        found = self._found(stage, masks, begin)
        stage.engine.train()
        return found

    @torch.no_grad()
    def _found(self, stage: Stage, masks: Masks | None, begin: Callable[[str], None]) -> Results:
        model = Evaluated(
            Scorer(LiveModel(stage, masks), stage.topology),
            self._texts,
            stage.topology,
            stage.config.model.max_position_embeddings,
            self._config.batch_size,
        )
        return evaluate(model, self._tasks, self._config.limit, begin)


def _open_texts(run: RunConfig) -> Texts:
    return RememberedTexts(open_texts(str(run.data.tokenizer), run.stages[0].model.vocab_size))


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
