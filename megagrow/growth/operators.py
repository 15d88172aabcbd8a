"""The table of operators: a name in a run file to the function that makes its GrowthMap."""

from collections.abc import Callable

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.depth import direct_depth
from megagrow.growth.map import GrowthMap

Operator = Callable[[ModelConfig, ModelConfig, GrowthConfig], GrowthMap]

OPERATORS: dict[str, Operator] = {"direct_depth": direct_depth}


def growth_map(source: ModelConfig, target: ModelConfig, options: GrowthConfig) -> GrowthMap:
    """The map from a source to a target model, by the operator that the run file names."""
    return OPERATORS[options.operator[0]](source, target, options)
