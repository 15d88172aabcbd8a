"""Length of stages in steps and tokens, from the keys `tokens`, `at_tokens` and `at_flops`.

A step is one optimizer step: global_batch_size x sequence_length tokens, fewer in a batch ramp. A
stage's tokens are rounded up to complete steps, so no step belongs to two stages.

A stage sets one of the three keys; `tokens` may be `auto`. Loading a run file resolves it into a
number of tokens. Tokens that a growth itself reads (`Counters.growth_tokens`) belong to no stage.

A batch size may change while a run is stopped. The lengths of a resumed run are therefore those of
the tokens that its stages were trained for, see `settled`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from megagrow.config.growth_guidelines import growth_tokens
from megagrow.config.schema import RunConfig
from megagrow.config.stage import BatchConfig, StageConfig
from megagrow.model.layers.flops import (
    flops_per_token,
    non_embedding_parameters,
    paper_flops_per_token,
)

LENGTHS = ("tokens", "at_tokens", "at_flops")
"""Keys that set the length of a stage."""

_UNSETTLED = 1
"""Placeholder in `tokens` until `settled` computes the number."""


def batch_at(stage: StageConfig, done: int = 0) -> BatchConfig:
    """Return the batch sizes of the optimizer step after the first `done` tokens of `stage`.

    A ramp has `global_batch_size` - `start` over `increment` increments, each after an equal share
    of its `samples`, as in Megatron-LM.
    """
    batch = stage.batch
    if batch.rampup_batch_size is None:
        return batch
    start, increment, _ = batch.rampup_batch_size
    size = start + bisect_right(_increments(stage), done) * increment
    return batch.model_copy(update={"global_batch_size": size, "rampup_batch_size": None})


def batch_sizes(batch: BatchConfig) -> range:
    """Return all global batch sizes of a stage, ascending."""
    last = batch.global_batch_size
    if batch.rampup_batch_size is None:
        return range(last, last + 1)
    start, increment, _ = batch.rampup_batch_size
    return range(start, last + 1, increment)


def _increments(stage: StageConfig) -> list[int]:
    """Return the tokens of `stage` after which its batch grows, ascending; empty without a ramp."""
    if stage.batch.rampup_batch_size is None:
        return []
    start, increment, samples = stage.batch.rampup_batch_size
    number = (stage.batch.global_batch_size - start) // increment
    sequences = (-(-samples * each // number) for each in range(1, number + 1))
    return [each * stage.data.sequence_length for each in sequences]


def step_tokens(stage: StageConfig, done: int = 0) -> int:
    """Return the tokens of the optimizer step after the first `done` tokens of `stage`, over all
    ranks."""
    return batch_at(stage, done).global_batch_size * stage.data.sequence_length


def step_starts(stage: StageConfig, done: int, end: int) -> Iterator[range]:
    """Yield the tokens of `stage` at which its steps from `done` to `end` begin, as one range for
    each batch size."""
    for change in (*_increments(stage), end):
        if done < min(change, end):
            starts = range(done, min(change, end), step_tokens(stage, done))
            yield starts
            done = starts[-1] + starts.step


def stage_steps(stage: StageConfig, done: int = 0) -> int:
    """Return the number of optimizer steps of `stage` after its first `done` tokens."""
    return sum(map(len, step_starts(stage, done, stage.tokens)))


def tokens_of_steps(stage: StageConfig, steps: int) -> int:
    """Return the tokens of the first `steps` optimizer steps of `stage`, also beyond its end."""
    most = steps * stage.batch.global_batch_size * stage.data.sequence_length
    for starts in step_starts(stage, 0, most):
        if steps <= len(starts):
            return starts.start + steps * starts.step
        steps -= len(starts)
    return 0


def stage_tokens(stage: StageConfig, done: int = 0) -> int:
    """Return the tokens trained in `stage`: its `tokens`, rounded up to complete steps, the first
    of which begins after `done` tokens."""
    if stage.exact_tokens is not None:
        return stage.exact_tokens
    ends = (starts[-1] + starts.step for starts in step_starts(stage, done, stage.tokens))
    return max(ends, default=done)


def steps_left(run: RunConfig, stage: int = 0, tokens: int = 0) -> int:
    """Return the optimizer steps of a run that follow after `tokens` tokens of stage `stage`."""
    in_stage = stage_steps(run.stages[stage], tokens)
    return in_stage + sum(stage_steps(later) for later in run.stages[stage + 1 :])


def tokens_between(run: RunConfig, first: int, last: int) -> int:
    """Return the tokens of the stages from `first` to `last`, exclusive."""
    return sum(stage_tokens(s) for s in run.stages[first:last])


def run_tokens(run: RunConfig) -> int:
    """Return the tokens of a run."""
    return tokens_between(run, 0, len(run.stages))


def run_flops(run: RunConfig) -> int:
    """Return the FLOPs of all stages, as counted by `flops_per_token`."""
    return sum(
        stage_tokens(stage) * flops_per_token(stage.model, stage.data.sequence_length)
        for stage in run.stages
    )


def lengths_in(tree: dict[str, Any]) -> list[str]:
    """Return the length keys set in a mapping of a run file; null is not set."""
    return [key for key in LENGTHS if tree.get(key) is not None]


def unsettled(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a stage of a run file in the format of StageConfig, with `tokens` still to settle."""
    written = {key: value for key, value in stage.items() if key not in LENGTHS}
    written |= {key: stage[key] for key in lengths_in(stage)}
    if written.get("tokens") == "auto":
        return written | {"tokens": _UNSETTLED, "tokens_auto": True}
    return {"tokens": _UNSETTLED, **written} if lengths_in(written) else written


def settled(
    run: RunConfig, stage: int = 0, tokens: int = 0, finished: Sequence[int] = ()
) -> RunConfig:
    """Return the run with `tokens` computed from `at_tokens`, `at_flops` and `auto`.

    `at_tokens` and `at_flops` are cumulative from the first token of the run, over the complete
    steps of the previous stages. FLOPs are 6 x parameters x tokens, without the cost of growth
    events.

    A run that has begun is given with its position. The result has the `exact_tokens` of the
    stages up to the current one, whose remaining steps begin at the position.

    Args:
        run: the run.
        stage: the current stage; `tokens` of the stages before it is not computed again.
        tokens: tokens trained in the current stage.
        finished: tokens trained in each stage before it; empty if unknown, which means their
            `tokens`.

    Raises:
        ValueError: a stage would have no tokens, or `auto` is undefined; the message names the key.
    """
    stages = list(run.stages)
    for index in reversed(range(len(stages))):  # auto depends on the following stage
        if stages[index].tokens_auto:
            stages[index] = _with_tokens(stages[index], _auto_tokens(stages, index))
    total = flops = 0
    for index, each in enumerate(stages):
        if index >= stage:
            each = _with_tokens(each, _tokens_left(each, f"stages.{index}", total, flops))
        if index < len(finished):
            each = _exactly(each, finished[index])
        elif index == stage and tokens > 0:
            each = _exactly(each, stage_tokens(each, tokens))
        stages[index], trained = each, stage_tokens(each)
        total += trained
        flops += trained * paper_flops_per_token(each.model)
    return run.model_copy(update={"stages": stages})


def _with_tokens(stage: StageConfig, tokens: int) -> StageConfig:
    return stage if stage.tokens == tokens else stage.model_copy(update={"tokens": tokens})


def _exactly(stage: StageConfig, tokens: int) -> StageConfig:
    return stage.model_copy(update={"exact_tokens": tokens})


def _auto_tokens(stages: Sequence[StageConfig], index: int) -> int:
    """Return the tokens of a stage by equation 2, from the following stage."""
    at = f"stages.{index}.tokens = auto"
    if index + 1 == len(stages):
        raise ValueError(f"{at} needs a following stage to grow into; set a number of tokens")
    after, there = stages[index + 1], f"stages.{index + 1}"
    if after.growth is None:
        raise ValueError(f"{at} is for a stage before a growth; {there} has none, set a number")
    for key in ("at_tokens", "at_flops"):
        if getattr(after, key) is not None:
            raise ValueError(f"{at} is computed from {there}.tokens; set it instead of {key}")
    tokens = growth_tokens(non_embedding_parameters(after.model), after.tokens)
    if tokens >= after.tokens:
        raise ValueError(
            f"{at}: equation 2 gives {tokens:.3g} tokens, not below {there}.tokens = "
            f"{after.tokens}; it does not hold at this size, set a number of tokens"
        )
    return max(1, round(tokens))


def _tokens_left(stage: StageConfig, at: str, tokens: int, flops: int) -> int:
    """Return the tokens of a stage, given the tokens and FLOPs of the previous stages."""
    if stage.at_tokens is not None:
        if stage.at_tokens <= tokens:
            raise ValueError(
                f"{at}.at_tokens = {stage.at_tokens} leaves no tokens for this stage: the previous "
                f"stages end at {tokens} tokens; use a larger value"
            )
        return stage.at_tokens - tokens
    if stage.at_flops is not None:
        if stage.at_flops <= flops:
            raise ValueError(
                f"{at}.at_flops = {stage.at_flops:.3g} leaves no tokens for this stage: the "
                f"previous stages take {flops:.3g} FLOPs (6 x parameters x tokens); use a larger "
                "value"
            )
        return -(-(stage.at_flops - flops) // paper_flops_per_token(stage.model))
    return stage.tokens
