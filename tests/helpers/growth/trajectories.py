"""Training of a source and of its grown model on the same batches."""

from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.parallel.engine_config import ParamScale
from tests.helpers.growth.cases import Case
from tests.helpers.growth.computing import (
    Adam,
    apart,
    fresh_state,
    random_ids,
    random_weights,
    trained,
    weights_of,
)
from tests.helpers.growth.whole import State, grown

BEFORE, AFTER = 5, 15
"""Steps of the source, and then of both."""


def batches(config: ModelConfig, count: int, seed: int = 0) -> list[Tensor]:
    return [random_ids(config, seed=seed + k) for k in range(count)]


def some_training(config: ModelConfig, adam: Adam | None = None) -> State:
    start = fresh_state(random_weights(config))
    return trained(config, start, batches(config, BEFORE), adam=adam)


def diverged(
    found: Case,
    transported: bool = True,
    scales: dict[str, ParamScale] | None = None,
    adam: Adam | None = None,
) -> float:
    """The largest difference of logits after the source and the grown model went on alike."""
    source, target = found.source, found.target
    old = some_training(source, adam)
    new = grown(old, found.growth, target)
    if not transported:
        new = fresh_state(weights_of(new))
    scales = dict(found.growth.scales) if scales is None else scales
    later = batches(source, AFTER, seed=1000)
    old = trained(source, old, later, BEFORE, adam)
    new = trained(target, new, later, BEFORE if transported else 0, adam, scales)
    return apart(found, weights_of(old), weights_of(new), random_ids(source, seed=7))
