"""One growth of a run, for tests of what is said of it."""

from typing import Any

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.constraints import Event
from megagrow.growth.validation import event_problems
from tests.helpers.growth.cases import Sizes, times

SOURCE = ModelConfig(
    num_hidden_layers=4,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=24,
    vocab_size=64,
    rms_norm_eps=1e-2,
)
DOUBLE = times(SOURCE, 2, 2, 2)
B, H = "stages.0.model", "stages.1"


def problems(target: Sizes, source: Sizes | None = None, **options: Any) -> list[str]:
    old = SOURCE.model_copy(update=source or {})
    new = old.model_copy(update=target)
    return event_problems(Event(old, new, GrowthConfig(**options), B, H))


def layers(count: int) -> Sizes:
    return {"num_hidden_layers": count}


DEPTH = f"{H}.model.num_hidden_layers"
LISTED = f"{H}.growth.layer_map"
