"""Small models of all families, each with every feature of its family."""

from typing import Any

from megagrow.config.schema import ModelConfig
from tests.helpers.hugging_face import tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2",
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "olmo2": {"model_type": "olmo2"},
}
"""Windows are shorter than the texts of the tests."""


def of_family(name: str, **changes: Any) -> ModelConfig:
    """A small model of a family, with two query heads per key/value head."""
    return tiny(**{"num_key_value_heads": 2} | FAMILIES[name] | changes)
