"""Stages, steps and tokens of a run, as pure functions of its config.

Tokens that a growth itself reads (`Counters.growth_tokens`) belong to no stage and are not counted.
"""

from typing import NamedTuple

from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import stage_steps, stage_tokens


class Position(NamedTuple):
    """Position in a run: a stage, counted from 0, and the number of its steps done."""

    stage: int
    step: int


def run_steps(run: RunConfig) -> int:
    """Return the optimizer steps of a run."""
    return sum(stage_steps(stage, run.data.sequence_length) for stage in run.stages)


def tokens_between(run: RunConfig, first: int, last: int) -> int:
    """Return the tokens of the stages from `first` to `last`, exclusive."""
    return sum(stage_tokens(s, run.data.sequence_length) for s in run.stages[first:last])


def run_tokens(run: RunConfig) -> int:
    """Return the tokens of a run."""
    return tokens_between(run, 0, len(run.stages))


def locate(run: RunConfig, step: int) -> Position:
    """Return the position after `step` steps of the run.

    The end of a stage is the start of the next one, (i + 1, 0); the end of the run is the end of
    the last stage. Raises ValueError outside the run.
    """
    last = len(run.stages) - 1
    left = step
    for index, stage in enumerate(run.stages):
        steps = stage_steps(stage, run.data.sequence_length)
        if 0 <= left < steps or (index == last and left == steps):
            return Position(index, left)
        left -= steps
    raise ValueError(f"step {step} is outside the run, which has {run_steps(run)} steps")
