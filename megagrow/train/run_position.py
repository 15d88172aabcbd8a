"""Where a run stands: stages, steps and tokens, as pure functions of the run's config.

What a growth itself consumes (`Counters.growth_tokens`) is no part of any stage and not counted.
"""

from typing import NamedTuple

from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import stage_steps, stage_tokens


class Position(NamedTuple):
    """A point in a run: a stage, counted from 0, and the steps of it that are done."""

    stage: int
    step: int


def run_steps(run: RunConfig) -> int:
    """Optimizer steps of the whole run."""
    return sum(stage_steps(stage, run.data.sequence_length) for stage in run.stages)


def tokens_between(run: RunConfig, first: int, last: int) -> int:
    """Tokens of the stages `first` up to, and without, `last`."""
    return sum(stage_tokens(s, run.data.sequence_length) for s in run.stages[first:last])


def run_tokens(run: RunConfig) -> int:
    """Tokens of the whole run."""
    return tokens_between(run, 0, len(run.stages))


def locate(run: RunConfig, step: int) -> Position:
    """The position at which `step` steps of the run are done.

    At the end of a stage that is the start of the next one, (i + 1, 0); at the end of the run it is
    the end of the last stage. Raises ValueError outside the run.
    """
    last = len(run.stages) - 1
    left = step
    for index, stage in enumerate(run.stages):
        steps = stage_steps(stage, run.data.sequence_length)
        if 0 <= left < steps or (index == last and left == steps):
            return Position(index, left)
        left -= steps
    raise ValueError(f"step {step} is outside the run, which has {run_steps(run)} steps")
