"""How long stages are, in steps and tokens, and how a run file may say it.

A step is one optimizer step: global_batch_size x sequence_length tokens. A stage's tokens are
rounded up to whole steps, so that no step belongs to two stages.

A run file gives the length of a stage by one of three keys: `tokens`, `at_tokens` or `at_flops`;
`tokens` may be `auto`. Each of them is settled into a number of tokens when the file is loaded.
"""

from collections.abc import Sequence
from typing import Any

from megagrow.config.flops import (
    flops_per_token,
    non_embedding_parameters,
    paper_flops_per_token,
)
from megagrow.config.growth_guidelines import growth_tokens
from megagrow.config.schema import RunConfig, StageConfig

LENGTHS = ("tokens", "at_tokens", "at_flops")
"""The keys of a stage that say how long it is."""

_UNSETTLED = 1
"""Stands for `tokens` until `settled` puts the number there."""


def step_tokens(stage: StageConfig, sequence_length: int) -> int:
    """Tokens of one optimizer step of `stage`, over all ranks."""
    return stage.batch.global_batch_size * sequence_length


def stage_steps(stage: StageConfig, sequence_length: int) -> int:
    """Optimizer steps of `stage`."""
    return -(-stage.tokens // step_tokens(stage, sequence_length))


def stage_tokens(stage: StageConfig, sequence_length: int) -> int:
    """Tokens that `stage` really trains on: its `tokens`, rounded up to whole steps."""
    return stage_steps(stage, sequence_length) * step_tokens(stage, sequence_length)


def run_flops(run: RunConfig) -> int:
    """Return the FLOPs of all stages, as counted by `flops_per_token`."""
    length = run.data.sequence_length
    return sum(stage_tokens(s, length) * flops_per_token(s.model, length) for s in run.stages)


def lengths_in(tree: dict[str, Any]) -> list[str]:
    """The length keys that a mapping of a run file gives; null gives none."""
    return [key for key in LENGTHS if tree.get(key) is not None]


def unsettled(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage of a run file as StageConfig has it, its `tokens` still to be settled."""
    written = {key: value for key, value in stage.items() if key not in LENGTHS}
    written |= {key: stage[key] for key in lengths_in(stage)}
    if written.get("tokens") == "auto":
        return written | {"tokens": _UNSETTLED, "tokens_auto": True}
    return {"tokens": _UNSETTLED, **written} if lengths_in(written) else written


def settled(run: RunConfig) -> RunConfig:
    """The run with the `tokens` that follow from `at_tokens`, `at_flops` and `auto`.

    `at_tokens` and `at_flops` count from the run's first token, in the whole steps that the stages
    before really train, FLOPs by the paper's account; what a growth itself consumes is not counted.
    Raises ValueError, naming the keys, where a stage would have no tokens or auto has no answer.
    """
    stages = list(run.stages)
    for index in reversed(range(len(stages))):  # auto looks at the stage that comes after
        if stages[index].tokens_auto:
            stages[index] = _with_tokens(stages[index], _auto_tokens(stages, index))
    tokens = flops = 0
    for index, stage in enumerate(stages):
        left = _tokens_left(stage, f"stages.{index}", tokens, flops)
        stages[index] = stage = _with_tokens(stage, left)
        trained = stage_tokens(stage, run.data.sequence_length)
        tokens += trained
        flops += trained * paper_flops_per_token(stage.model)
    return run.model_copy(update={"stages": stages})


def _with_tokens(stage: StageConfig, tokens: int) -> StageConfig:
    return stage if stage.tokens == tokens else stage.model_copy(update={"tokens": tokens})


def _auto_tokens(stages: Sequence[StageConfig], index: int) -> int:
    """What equation 2 gives for a stage, from the stage after it."""
    at = f"stages.{index}.tokens = auto"
    if index + 1 == len(stages):
        raise ValueError(f"{at}: no stage comes after it to grow into; give a number of tokens")
    after, there = stages[index + 1], f"stages.{index + 1}"
    for key in ("at_tokens", "at_flops"):
        if getattr(after, key) is not None:
            raise ValueError(f"{at} follows from {there}.tokens: give that in place of {key}")
    tokens = growth_tokens(non_embedding_parameters(after.model), after.tokens)
    if tokens >= after.tokens:
        raise ValueError(
            f"{at}: equation 2 gives {tokens:.3g} tokens, no less than {there}.tokens = "
            f"{after.tokens} of the model that is to gain by it; it does not hold at this size, "
            "give a number of tokens"
        )
    return max(1, round(tokens))


def _tokens_left(stage: StageConfig, at: str, tokens: int, flops: int) -> int:
    """The stage's own tokens, when so many tokens and FLOPs of the run lie before it."""
    if stage.at_tokens is not None:
        if stage.at_tokens <= tokens:
            raise ValueError(
                f"{at}.at_tokens = {stage.at_tokens} is not above the {tokens} tokens of the "
                "stages before it: this stage would have none"
            )
        return stage.at_tokens - tokens
    if stage.at_flops is not None:
        if stage.at_flops <= flops:
            raise ValueError(
                f"{at}.at_flops = {stage.at_flops:.3g} is passed before the stage begins: the "
                f"stages before it take {flops:.3g} FLOPs (6 x parameters x tokens)"
            )
        return -(-(stage.at_flops - flops) // paper_flops_per_token(stage.model))
    return stage.tokens
