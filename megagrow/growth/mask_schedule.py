"""Schedule of the growth masks of `random_depth` and `random_width`.

Masks are not stored: they are a function of the run and a position in it.
"""

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.config.stage_length import tokens_of_steps
from megagrow.growth.operators import depth_of, is_masked
from megagrow.model.masks import Masks, masks_at, wider_axes

GROW_STEPS = 5000
"""Default steps of one ramp: `grow_step` of the paper's code (tongxuluo/prts, msg.py)."""


def growth_masks(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, tokens: int, ramp_tokens: int
) -> Masks | None:
    """Return the masks `tokens` tokens after a growth; None if nothing is masked."""
    if not is_masked(options):
        return None
    layers = depth_of(source, target, options).layers
    new_layers = [index for index, layer in enumerate(layers) if layer.source is None]
    return masks_at(source, target, tokens, ramp_tokens, new_layers)


def ramp_tokens(run: RunConfig, index: int) -> int:
    """Return the tokens of stage `index` until all its masks are 1; 0 if it has none.

    Default: 5000 steps for each consecutive ramp. A ramp is at most `tokens` of the stage, not
    rounded up to complete steps: the stage ends there if its batch size changes.
    """
    stage = run.stages[index]
    if index == 0 or stage.growth is None or not is_masked(stage.growth):
        return 0
    ramp = stage.growth.ramp_tokens
    if ramp is None:
        ramps = max(1, len(wider_axes(run.stages[index - 1].model, stage.model)))
        ramp = tokens_of_steps(stage, ramps * GROW_STEPS)
    return min(ramp, stage.tokens)


def stage_masks(run: RunConfig, index: int, tokens: int) -> Masks | None:
    """Return the masks after `tokens` tokens of stage `index`; None if nothing is masked.

    They cover the full axes, on the CPU; `parallel.tensor_parallel.rank_masks` slices them by rank.
    """
    length, stage = ramp_tokens(run, index), run.stages[index]
    if stage.growth is None or tokens >= length:
        return None
    return growth_masks(run.stages[index - 1].model, stage.model, stage.growth, tokens, length)


def ramp_problems(run: RunConfig) -> list[str]:
    """Return the problems of a run's ramps, each with its fix."""
    found = []
    for index, stage in enumerate(run.stages):
        at, growth = f"stages.{index}", stage.growth
        if growth is None or not growth.ramp_tokens:
            continue
        if growth.ramp_tokens > stage.tokens:
            found.append(
                f"{at}.growth.ramp_tokens = {growth.ramp_tokens} is more than the {stage.tokens} "
                f"tokens of {at}: parts of the model would still be masked when the stage ends; "
                "lower it, or train the stage for longer"
            )
    return found
