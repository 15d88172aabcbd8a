"""Conversion between Hugging Face's config.json, generation_config.json and ModelConfig.

Both forms of rotary embeddings are supported: `rope_parameters` of transformers 5, `rope_theta` and
`rope_scaling` of transformers 4. Keys that name code are dropped, so no code of a folder is ever
executed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagrow.common.json_text import read_json
from megagrow.config.includes import checked_model
from megagrow.config.model import ROPE_TYPES
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ORIGIN_KEY = "hugging_face"
"""Key of a source's environment that stores the configs of its Hugging Face folder."""

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""LlamaConfig's defaults of keys that may be absent in config.json."""

_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_ONLY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
"""Keys with a single supported value."""

_CODE_KEYS = ("auto_map", "trust_remote_code")
"""Keys that make transformers load Python files of the folder."""

_ORIGINAL = "original_max_position_embeddings"

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Hugging Face's dtype names by safetensors' dtype names."""


def model_of(config: dict[str, Any], origin: str) -> ModelConfig:
    """Convert a config.json. Raises CheckpointError, with `origin`, for unsupported models."""
    for key, only in _ONLY.items():
        if config.get(key, only) != only:
            raise CheckpointError(f"{origin}: {key} = {config[key]!r}, only {only!r} is supported")
    values = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    values |= {key: config[key] for key in (*_KEYS, "vocab_size") if key in config}
    values = {key: value for key, value in values.items() if value is not None}
    return checked_model(values | _rope_of(config, values, origin), origin)


def _rope_of(
    config: dict[str, Any], values: dict[str, Any], origin: str
) -> dict[str, float | dict[str, Any] | None]:
    """Return rope_theta and rope_scaling.

    As in transformers 5, rope_scaling takes precedence over rope_parameters, and keys inside them
    over keys at the top level.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{origin}: rope_scaling should be a mapping, it is {rope!r}")
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    part = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if part != 1.0:
        raise CheckpointError(f"{origin}: partial_rotary_factor = {part}, only 1.0 is supported")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ROPE_TYPES:
        known = ", ".join(["default", *ROPE_TYPES])
        raise CheckpointError(f"{origin}: rope_type {kind!r} is not one of {known}")
    if kind in ("llama3", "yarn"):
        outer = config.get(_ORIGINAL)
        inner = rope.setdefault(_ORIGINAL, outer or values.get("max_position_embeddings"))
        if outer not in (None, inner):
            raise CheckpointError(f"{origin}: {_ORIGINAL} is {outer} and {inner}; keep one")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **rope}}


def config_of(model: ModelConfig, dtype: str, like: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model with weights of `dtype`.

    Other keys are copied from `like`, the config.json of the model's origin. transformers 5 reads
    rope_parameters, transformers 4 reads rope_theta and rope_scaling.
    """
    values = model.model_dump()
    scaling = None if model.rope_scaling is None else model.rope_scaling.given()
    values["rope_scaling"] = scaling
    config = {**without_code(like), **_ONLY, **values, "architectures": ["LlamaForCausalLM"]}
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": model.rope_theta,
        **(scaling or {}),
    }
    config["dtype"] = config["torch_dtype"] = DTYPE_NAMES[dtype]
    return config


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that make transformers load Python files."""
    return {key: value for key, value in config.items() if key not in _CODE_KEYS}


def origin_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a model's environment that records its Hugging Face folder."""
    path = folder / GENERATION_FILE
    generation = read_json(path, CheckpointError) if path.is_file() else None
    origin = {"folder": str(folder.resolve()), "config": without_code(config)}
    return {ORIGIN_KEY: origin | {"generation_config": generation}}


def generation_of(origin: dict[str, Any] | None, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the generation_config.json of a model: that of its origin with a tokenizer's ids."""
    before = (origin or {}).get("generation_config")
    return {**(before or {}), **ids}
