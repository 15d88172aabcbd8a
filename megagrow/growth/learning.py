"""What keeps a growth from being learned, each in one text that says what to do. Pure."""

from collections.abc import Iterator

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.operators import OPERATORS, follows_exactly, is_learned, state_policy


def learning_problems(
    source: ModelConfig, target: ModelConfig, options: GrowthConfig, at: str
) -> Iterator[str]:
    """What is wrong with a growth by `learn_depth` or `learn_width`, whose section stands `at`."""
    if not is_learned(options):
        return
    deeper = source.num_hidden_layers != target.num_hidden_layers
    for name in options.operator:
        if OPERATORS[name].deeper and not deeper:
            yield f"{at}.operator: {name} needs a model with more layers; take {name} out"
        if OPERATORS[name].wider and not _wider(source, target):
            yield f"{at}.operator: {name} needs a wider model; take {name} out"
    for key, given in (
        ("literal", options.literal),
        ("block", options.block == "random"),
        ("noise", options.noise),
        ("mixing_noise", options.mixing_noise),
    ):
        if given:
            yield f"{at}.{key} does not go with a growth that is learned from copies: leave it out"
    if state_policy(options) in ("asymmetric", "probe_v"):
        yield (
            f"{at}.optimizer_state = {options.optimizer_state}: a learned growth mixes old and new "
            "entries; set it to reset, keep_v or transport"
        )
    if follows_exactly(options):
        yield f"{at}.exact_continuation needs even copies, not learned ones: set it to false"
    learn = options.learn
    if learn.min_lr > learn.lr:
        yield f"{at}.learn.min_lr = {learn.min_lr} is above lr = {learn.lr}"
    if learn.warmup_steps > learn.steps:
        yield f"{at}.learn.warmup_steps = {learn.warmup_steps} is above steps = {learn.steps}"


def _wider(source: ModelConfig, target: ModelConfig) -> bool:
    names = ("hidden_size", "intermediate_size", "num_key_value_heads")
    return any(getattr(source, name) != getattr(target, name) for name in names)
