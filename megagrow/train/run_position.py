"""Steps and tokens of a run, as pure functions of its config and a position in it.

Tokens that a growth itself reads (`Counters.growth_tokens`) belong to no stage and are not counted.
"""

from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import stage_steps, stage_tokens, step_tokens


def steps_left(run: RunConfig, stage: int = 0, tokens: int = 0) -> int:
    """Return the optimizer steps of a run that follow after `tokens` tokens of stage `stage`."""
    length, current = run.data.sequence_length, run.stages[stage]
    in_stage = -(-max(0, current.tokens - tokens) // step_tokens(current, length))
    return in_stage + sum(stage_steps(later, length) for later in run.stages[stage + 1 :])


def tokens_between(run: RunConfig, first: int, last: int) -> int:
    """Return the tokens of the stages from `first` to `last`, exclusive."""
    return sum(stage_tokens(s, run.data.sequence_length) for s in run.stages[first:last])


def run_tokens(run: RunConfig) -> int:
    """Return the tokens of a run."""
    return tokens_between(run, 0, len(run.stages))
