"""Growths by lifts that no operator chooses: controls, right and wrong."""

from dataclasses import replace

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.build_map import GrowthSpec, assemble
from megagrow.growth.depth import same_depth
from megagrow.growth.lifts import Lift
from megagrow.growth.map import GrowthMap
from megagrow.growth.width import Wire, same_width
from tests.helpers.growth.cases import Case


class Built(Case):
    """A growth whose map is made by hand."""

    def __init__(self, source: ModelConfig, target: ModelConfig, growth: GrowthMap) -> None:
        super().__init__(source, target, GrowthConfig())
        self.__dict__["growth"] = growth


def by_lifts(source: ModelConfig, target: ModelConfig, wires: dict[Wire, Lift]) -> Built:
    """The growth of some wires of a model, the others as they are."""
    width = same_width(source)
    width = replace(width, wires=width.wires | wires)
    parts = GrowthSpec(source, target, same_depth(source), width, GrowthConfig(), "transport", "7")
    return Built(source, target, assemble(parts))
