"""A growth of a small model: source, target and options."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.constraints import Event
from megagrow.growth.map import GrowthMap
from megagrow.growth.operators import growth_map, resolve_operators
from megagrow.growth.validation import event_problems
from megagrow.parallel.optimizers.rules import ADAMW, UpdateRule

Sizes = dict[str, Any]
"""Fields of a model config, or keys of `growth`."""


@dataclass(frozen=True)
class GrowthCase:
    """One growth of a model."""

    source: ModelConfig
    target: ModelConfig
    options: GrowthConfig
    matrices: UpdateRule = ADAMW
    """Optimizer of the matrices of decoder layers."""

    @cached_property
    def growth(self) -> GrowthMap:
        """Growth map from source to target."""
        return growth_map(self.source, self.target, self.options, "7/stage-1", self.matrices)


def growth_case(source: ModelConfig, target: Sizes, **options: Any) -> GrowthCase:
    """Build the growth of a source to other sizes.

    The norm eps of the target is scaled with the gain of the norms, as a run requires. Raises
    AssertionError if a run would refuse the growth.
    """
    config = GrowthConfig(**options)
    model = source.model_copy(update=target)
    width = resolve_operators(source, model, config, "").width
    if width.scaled_eps:
        eps = source.rms_norm_eps * width.gain**2
        model = model.model_copy(update={"rms_norm_eps": eps})
    assert event_problems(Event(source, model, config, "before", "here")) == []
    return GrowthCase(source, model, config)


def widened(source: ModelConfig, residual: int, groups: int, ffn: int) -> Sizes:
    """Return the fields of a wider model with the head width and grouping of the source."""
    queries = source.num_attention_heads // source.num_key_value_heads
    return {
        "hidden_size": residual,
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
    }


def times(source: ModelConfig, residual: int, groups: int, ffn: int) -> Sizes:
    """Return the fields of a model that is wider by integer factors."""
    return widened(
        source,
        residual * source.hidden_size,
        groups * source.num_key_value_heads,
        ffn * source.intermediate_size,
    )
