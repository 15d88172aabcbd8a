"""Growths of a tiny model by every operator that can grow files, for tests."""

from typing import Any

from megagrow.config.schema import ModelConfig

BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 37,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-3,
}
WIDE = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "head_dim": 4,
}
ANY = WIDE | {"hidden_size": 24, "intermediate_size": 40}
LOW_EPS = {"rms_norm_eps": 1e-3 * 16 / 24}
DEEP = {"num_hidden_layers": 4}

Growth = tuple[dict[str, Any], dict[str, Any]]
"""Changes to BASE, and the options of the growth."""

GROWTHS: dict[str, Growth] = {
    "stack": (DEEP, {"operator": "direct_depth"}),
    "interpolate, reset": (
        DEEP,
        {"operator": "direct_depth", "layer_map": "interpolate", "optimizer_state": "reset"},
    ),
    "zero depth": (DEEP, {"operator": "zero_depth"}),
    "random depth": (DEEP, {"operator": "random_depth", "ramp_tokens": 100}),
    "mixing noise": (DEEP, {"operator": "direct_depth", "mixing_noise": 0.2}),
    "solar": ({"num_hidden_layers": 4}, {"operator": "solar"}),
    "copy": (WIDE, {"operator": "direct_width"}),
    "tiled, uneven": (
        WIDE,
        {"operator": "direct_width", "copy_order": "tiled", "copy_split": "uneven"},
    ),
    "net2net, keep_second_moment": (
        WIDE,
        {"operator": "net2net_width", "optimizer_state": "keep_second_moment"},
    ),
    "staged": (WIDE, {"operator": "staged_width"}),
    "fpi": (WIDE, {"operator": "bert2bert_fpi"}),
    "aki": (WIDE, {"operator": "bert2bert_aki"}),
    "hypercloning": (WIDE, {"operator": "hypercloning"}),
    "mup": (WIDE, {"operator": "mup_copy"}),
    "sparkling": (WIDE, {"operator": "sparkling"}),
    "zero width": (ANY | LOW_EPS, {"operator": "zero_width"}),
    "random width": (ANY, {"operator": "random_width", "ramp_tokens": 100}),
    "lemon": (ANY | LOW_EPS, {"operator": "lemon"}),
    "isometric": ({"hidden_size": 24, "head_dim": 4} | LOW_EPS, {"operator": "isometric"}),
    "head_dim": ({"head_dim": 8}, {"operator": "head_dim"}),
    "vocabulary": ({"vocab_size": 41}, {"operator": "vocabulary"}),
    "depth and width": (DEEP | WIDE, {"operator": ["zero_depth", "direct_width"]}),
}


def base(**changes: Any) -> ModelConfig:
    """The source."""
    return ModelConfig(**BASE | changes)
