"""Random inputs in fp64, and the change of the logits that a growth causes."""

import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig
from tests.helpers.growth.cases import Case
from tools.docs.operators.dense_growth import State
from tools.docs.operators.reference_training import (
    Tensors,
    apart,
    grown_weights,
    random_ids,
    random_weights,
)


def random_moments(config: ModelConfig, seed: int = 0) -> State:
    """Return random weights, exp_avg and exp_avg_sq."""
    weights, first, second = (random_weights(config, seed + 100 * k) for k in range(3))
    return {
        name: {"fp32": weights[name], "exp_avg": first[name], "exp_avg_sq": second[name] ** 2}
        for name in weights
    }


def every_id(config: ModelConfig, seed: int = 0) -> Tensor:
    """Return one sequence that contains every token twice, (1, 2 vocab) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(2 * config.vocab_size, generator=generator)[None] % config.vocab_size


def difference(case: Case, weights: Tensors | None = None) -> float:
    """Return the largest change of a logit by a growth, over two ranges of positions."""
    weights = random_weights(case.source) if weights is None else weights
    after = grown_weights(case, weights)
    ids = random_ids(case.source)
    return max(apart(case, weights, after, ids, first) for first in (0, 13))
