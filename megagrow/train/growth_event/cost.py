"""What a growth event reads and uses up by itself, where it trains to find out how to grow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from megagrow.config.flops import flops_per_token, paper_flops_per_token
from megagrow.config.schema import StageConfig
from megagrow.config.stage_length import step_tokens
from megagrow.data.batches import Batch, BatchReader, read_micro_batches
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import Topology


class Feed(NamedTuple):
    """The run's stream, from the token on that comes next."""

    reader: BatchReader
    position: int
    length: int
    """Of a sequence."""
    before_step: Callable[[], None] = lambda: None
    """Called on all ranks before each step: it may end the growth by an exception."""

    def batches(self, step: int, stage: StageConfig, topology: Topology) -> list[Batch]:
        """This rank's micro batches of a step to come, 0 being the next; all ranks together.

        InputError on all ranks if the stream can not be read on one.
        """
        self.before_step()
        position = self.position + step * step_tokens(stage, self.length)
        grid = topology.dp_rank, topology.dp
        return run_on_all_ranks(
            partial(read_micro_batches, self.reader, position, stage.batch, *grid)
        )


@dataclass(frozen=True)
class GrowthCost:
    """What a growth used up by training."""

    tokens: int = 0
    """Of the stream, which goes on behind them."""
    flops: float = 0.0
    """By the paper's account."""
    flops_true: float = 0.0
    """With attention, and with what it takes to make learned weights."""
    losses: tuple[float, ...] = ()
    """Of each step of a learned growth the mean over its tokens, in nats, before the update."""

    def plus(self, other: "GrowthCost") -> "GrowthCost":
        """Both together; the losses are those of the first."""
        return GrowthCost(
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.flops_true + other.flops_true,
            self.losses,
        )


def spent_on_steps(stage: StageConfig, length: int, steps: int) -> GrowthCost:
    """The FLOPs of some steps of a stage whose tokens are trained on again later."""
    tokens = steps * step_tokens(stage, length)
    return GrowthCost(
        flops=paper_flops_per_token(stage.model) * tokens,
        flops_true=flops_per_token(stage.model, length) * tokens,
    )
