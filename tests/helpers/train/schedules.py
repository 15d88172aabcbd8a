"""Runs whose stages have schedules, for tests of the learning rate."""

from typing import Any, NamedTuple

from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import stage_steps, step_tokens, steps_left, tokens_between

LENGTH, BATCH = 8, 4
STEP = LENGTH * BATCH
MODEL = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 16,
}


def stage(steps: int, growth: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "tokens": steps * STEP,
        "batch": {"global_batch_size": BATCH, "micro_batch_size": 1},
        "optimizer": {"lr": 1.0, "min_lr": 0.1},
        "growth": growth,
        **changes,
    }


def make_run(*stages: dict[str, Any]) -> RunConfig:
    data = {"train": [{"path": "corpus"}], "sequence_length": LENGTH}
    whole = {"name": "run", "output_dir": "out", "data": data, "stages": stages}
    return RunConfig.model_validate(whole)


BY_SIZE = {"lr_schedule": "by_size"}
DEEP = {"model": MODEL | {"num_hidden_layers": 4}}


class Position(NamedTuple):
    """A stage, counted from 0, and the number of its steps done."""

    stage: int
    step: int


def locate(run: RunConfig, step: int) -> Position:
    """Return the position after `step` steps; the end of a stage is the start of the next one."""
    assert 0 <= step <= steps_left(run)
    last = len(run.stages) - 1
    for index, one in enumerate(run.stages):
        steps = stage_steps(one)
        if step < steps or index == last:
            return Position(index, step)
        step -= steps
    raise AssertionError


def tokens_at(run: RunConfig, step: int) -> int:
    """Return the tokens trained on after `step` steps, without those that growth events read."""
    position = locate(run, step)
    size = step_tokens(run.stages[position.stage])
    return tokens_between(run, 0, position.stage) + position.step * size
