"""Forward pass of the model in training, for its evaluation in place."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.evaluation.forward_model import positions_of
from megagrow.model.decoder import HeadLoss
from megagrow.model.decoding import DecodingCache
from megagrow.model.masks import Masks
from megagrow.parallel.pipeline.passes import forward_head
from megagrow.train.stage import Stage


@dataclass(frozen=True)
class StageModel:
    """Engine of a stage in evaluation mode, with its current masks.

    A `ForwardModel`.
    """

    stage: Stage
    masks: Masks | None

    @property
    def config(self) -> ModelConfig:
        return self.stage.config.model

    def forward_head(
        self, ids: Tensor, head: HeadLoss, result: Tensor, cache: DecodingCache | None = None
    ) -> None:
        """Run one pass; under ZeRO-3 the other data-parallel ranks run one at the same time."""
        self._any_rank_working(True)
        self._forward(ids, head, result, cache)

    def finish(self) -> None:
        """Run dummy passes while other ranks run passes.

        Under ZeRO-3 every rank takes part in the all-gather of weights.
        """
        while self._any_rank_working(False):
            dummy = torch.zeros(1, 1, dtype=torch.int64, device=self.stage.topology.device)
            self._forward(dummy, _empty_head, dummy.new_empty(()))

    def _forward(
        self, ids: Tensor, head: HeadLoss, result: Tensor, cache: DecodingCache | None = None
    ) -> None:
        parallel, columns = self.stage.config.parallel, ids.shape[1]
        if parallel.sequence_parallel:  # needs a length divisible by the tensor-parallel size
            ids = F.pad(ids, (0, -ids.shape[1] % parallel.tensor_model_parallel_size))
        positions = positions_of(ids, columns, cache)
        inputs = (ids, positions, None, self.masks)
        forward_head(self.stage.engine, inputs, head, result, cache)

    def _any_rank_working(self, working: bool) -> bool:
        """Return True if a rank runs a pass in which this rank has to take part."""
        topology = self.stage.topology
        if self.stage.config.parallel.zero_stage < 3:
            return working
        vote = torch.tensor([float(working)], device=topology.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=topology.dp_group)
        return vote.item() > 0


def _empty_head(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    return hidden_BSD.new_zeros(())
