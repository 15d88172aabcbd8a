"""Data and cost accounting of growth events that train (LiGO, operator search)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from megagrow.config.schema import StageConfig
from megagrow.config.stage_length import batch_at, step_tokens
from megagrow.data.batches import Batch
from megagrow.data.stage_streams import StreamPlace
from megagrow.model.layers.flops import flops_per_token, paper_flops_per_token
from megagrow.model.ops import Ops
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import Topology
from megagrow.train.step_feed import StepFeed, StepPart


class Feed(NamedTuple):
    """Training data of the next stage from its start."""

    reader: StepFeed
    place: StreamPlace
    before_step: Callable[[], None] = lambda: None
    """Called on all ranks before each step; may abort the growth by an exception."""

    def batches(self, step: int, stage: StageConfig, topology: Topology, ops: Ops) -> list[Batch]:
        """Read this rank's micro-batches of a future step; 0 is the next one. Collective.

        All steps have the batch of the stage's first one. The following step is prefetched. Raises
        InputError on all ranks if one of them cannot read the stream.
        """
        self.before_step()
        this, following = (
            StepPart.of(
                self.place.after(number * step_tokens(stage)), batch_at(stage), topology, ops
            )
            for number in (step, step + 1)
        )
        batches = run_on_all_ranks(partial(self.reader.read, this))
        self.reader.prefetch(following)
        return batches


@dataclass(frozen=True)
class GrowthCost:
    """Cost of a growth that trains."""

    tokens: int = 0
    """Tokens consumed from the stream."""
    flops: float = 0.0
    """FLOPs by the paper's formula."""
    flops_true: float = 0.0
    """FLOPs with attention, and with the computation of learned weights."""
    losses: tuple[float, ...] = ()
    """Mean loss per token in nats of each step of a learned growth, before the update."""

    def plus(self, other: "GrowthCost") -> "GrowthCost":
        """Return the sum of both costs, with the losses of this one."""
        return GrowthCost(
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.flops_true + other.flops_true,
            self.losses,
        )


def spent_on_steps(stage: StageConfig, steps: int) -> GrowthCost:
    """Return the FLOPs of steps whose tokens are trained on again later."""
    tokens = steps * step_tokens(stage)
    return GrowthCost(
        flops=paper_flops_per_token(stage.model) * tokens,
        flops_true=flops_per_token(stage.model, stage.data.sequence_length) * tokens,
    )
