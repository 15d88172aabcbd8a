"""Growths by lifts that no operator chooses: controls, right and wrong."""

from dataclasses import replace

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.build_map import GrowthSpec, assemble
from megagrow.growth.depth import same_depth
from megagrow.growth.lifts import Lift
from megagrow.growth.map import GrowthMap
from megagrow.growth.width import same_width
from tests.helpers.growth.cases import Case


class Built(Case):
    """A growth whose map is made by hand."""

    def __init__(self, source: ModelConfig, target: ModelConfig, growth: GrowthMap) -> None:
        super().__init__(source, target, GrowthConfig())
        self.__dict__["growth"] = growth


def by_lifts(source: ModelConfig, target: ModelConfig, lifts: dict[str, Lift]) -> Built:
    """Return the growth of some activation axes of a model by lifts."""
    width = same_width(source)
    width = replace(width, lifts=width.lifts | lifts)
    parts = GrowthSpec(source, target, same_depth(source), width, GrowthConfig(), "transport", "7")
    return Built(source, target, assemble(parts))
