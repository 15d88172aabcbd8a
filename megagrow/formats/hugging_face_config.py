"""Conversion between Hugging Face's config.json and ModelConfig.

Both forms of rotary embeddings are supported: `rope_parameters` of transformers 5, `rope_theta` and
`rope_scaling` of transformers 4. The reference is the class of the family in transformers
(`hugging_face_families.py`): a key with an effect that ModelConfig cannot express is refused, a
RoPE key without effect there is ignored. Keys that name code are dropped, so no code of a folder is
ever executed.
"""

from typing import Any

from megagrow.config.model import (
    FEATURE_KEYS,
    MAMBA_KEYS,
    ROPE_TYPES,
    family_features,
    rope_keys,
)
from megagrow.config.model_file import checked_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face_families import FAMILIES, READ_KEYS, Family

CONFIG_FILE = "config.json"

_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    "vocab_size",
)
"""Keys without a default here, unlike in transformers: a config.json without them is refused."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
}
"""Keys with a fixed set of supported values, the exported one first."""

_OFF = (
    *("attention_bias", "mlp_bias", "bias", "use_bias", "qkv_bias", "use_attention_bias"),
    *("lm_head_bias", "qk_norm", "use_qk_norm", "qk_layernorm", "use_parallel_residual"),
    *("clip_qkv", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("attention_multiplier", "attn_temperature_tuning", "attention_chunk_size", "alibi"),
    *("use_bidirectional_attention", "no_rope_layers", "no_rope_layer_interval"),
    *("rope_interleave", "rope_interleaved", "kv_lora_rank", "q_lora_rank"),
    *("num_kv_shared_layers", "kv_sharing_modes", "num_local_experts", "num_experts"),
    *("n_routed_experts", "moe_num_experts", "num_nextn_predict_layers", "num_mtp_layers"),
    *("scale_embedding", "scale_depth", "dim_model_base", "add_cross_attention"),
    *("is_encoder_decoder", "pruned_heads", "per_layer_config", "quantization_config"),
    "transformers_weights",
)
"""Keys of the families and their variants that change the function or the tensors unless they are
null, false, zero or empty, or the value of the family. `pretraining_tp` is not among them: it
splits the same matrix products."""

_ONE = (
    *("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "scale_emb"),
    *("embedding_multiplier", "residual_multiplier", "rotary_pct", "partial_rotary_factor"),
)
"""Factors of variants of the families, without effect if they are null or 1."""

_DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")

_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
"""Keys that make transformers run Python files of a folder or of a repository."""

_MOST_LEVELS = 100
"""Maximum nesting of a JSON document that is kept."""

_ORIGINAL = "original_max_position_embeddings"

_NOT_EXPORTED = ("layer_types", "sliding_window", "partial_rotary_factor", _ORIGINAL)
"""Keys without effect on the imported model that could contradict the exported one."""

_BY_FAMILY = {*FEATURE_KEYS, "sliding_window", *MAMBA_KEYS}
"""Keys of ModelConfig that the class of a family implies, or that `Family.window_keys` writes."""

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Hugging Face's dtype names by safetensors' dtype names."""


def model_of(config: dict[str, Any], origin: str) -> ModelConfig:
    """Convert a config.json. Raises CheckpointError, with `origin`, for unsupported models."""
    name = config.get("model_type", "llama")
    if name not in list(FAMILIES):
        raise CheckpointError(
            f"{origin}: model_type = {name!r:.200}, supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    for key, supported in _unsupported(config, family, family_features(name)):
        value = f"{config[key]!r:.200}"
        raise CheckpointError(f"{origin}: {key} = {value}, only {supported} is supported")
    values = {key: config.get(key, family.default(key)) for key in READ_KEYS}
    values |= {key: config[key] for key in _SIZES if key in config}
    values = {key: value for key, value in values.items() if value is not None}
    values |= {"model_type": name, "layer_types": family.layer_types(config)}
    if "sliding_attention" in values["layer_types"]:
        values["sliding_window"] = family.window(config)
    return checked_model(values | _rope_of(config, values, origin), origin)


def _unsupported(
    config: dict[str, Any], family: Family, features: dict[str, Any]
) -> list[tuple[str, str]]:
    """Return the keys with an effect that ModelConfig cannot express, and the supported value."""
    found = [
        (key, repr(values[0]))
        for key, values in _ONLY.items()
        if key in config and config[key] not in values
    ]
    wrong = [key for key in _OFF if config.get(key) and config[key] != features.get(key)]
    found += [(key, "False") for key in wrong]
    found += [(key, "1.0") for key in _ONE if config.get(key) not in (None, 1)]
    return [*found, *family.unsupported(config)]


def _rope_of(
    config: dict[str, Any], values: dict[str, Any], origin: str
) -> dict[str, float | dict[str, Any] | None]:
    """Return rope_theta and rope_scaling, as transformers 5 reads them.

    rope_scaling takes precedence over rope_parameters, and keys inside them over keys at the top
    level, except original_max_position_embeddings.
    """
    rope, kind = _rope_section(config, origin)
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    part = rope.get("partial_rotary_factor")
    if part not in (None, 1):
        raise CheckpointError(f"{origin}: partial_rotary_factor = {part}, only 1.0 is supported")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {key: rope[key] for key in sorted(rope_keys(kind)) if rope.get(key) is not None}
    most = values.get("max_position_embeddings")
    if kind in ("llama3", "yarn"):
        scaling[_ORIGINAL] = config.get(_ORIGINAL) or scaling.get(_ORIGINAL, most)
    if kind == "yarn" and rope.get("factor", 1) is None:
        sizes = most, scaling[_ORIGINAL]
        scaling["factor"] = (
            most / sizes[1] if all(type(n) is int and n > 0 for n in sizes) else None
        )
    if kind == "yarn" and "truncate" in rope:
        scaling["truncate"] = bool(rope["truncate"])
    return {"rope_theta": theta, "rope_scaling": scaling | {"rope_type": kind}}


def _rope_section(config: dict[str, Any], origin: str) -> tuple[dict[str, Any], str]:
    """Return the mapping of RoPE keys and its type."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{origin}: rope_scaling should be a mapping, it is {rope!r:.200}")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise CheckpointError(
            f"{origin}: RoPE settings of a layer type ({nested[0]}) are not supported; only one "
            "setting for all layers is"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", *ROPE_TYPES):
        known = ", ".join(["default", *ROPE_TYPES])
        raise CheckpointError(f"{origin}: rope_type {kind!r:.200} is not one of {known}")
    return rope, kind


def config_warnings(config: dict[str, Any], origin: str) -> list[str]:
    """Return a line for every kind of key of a supported config.json that is not followed."""
    rope, kind = _rope_section(config, origin)
    read = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    read |= rope_keys(kind) if kind in ROPE_TYPES else set()
    ignored = sorted(key for key, value in rope.items() if key not in read and value is not None)
    lines = []
    if ignored:
        names = ", ".join(ignored)
        lines.append(f"{origin}: rope_type {kind} has no {names}; ignored, as in transformers")
    lines += [
        f"{origin}: {key} = {config[key]}, but megagrow trains without dropout"
        for key in _DROPOUTS
        if config.get(key)
    ]
    return lines + code_warnings(config, origin)


def config_of(model: ModelConfig, dtype: str, like: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model with weights of `dtype`.

    Other keys are copied from `like`, the config.json of the model's origin. transformers 5 reads
    rope_parameters, transformers 4 reads rope_theta and rope_scaling. The model must have no
    `export_problems`.
    """
    family = FAMILIES[model.model_type]
    values = model.model_dump(exclude=_BY_FAMILY)
    scaling = None if model.rope_scaling is None else model.rope_scaling.given()
    values["rope_scaling"] = scaling
    config = {key: value for key, value in without_code(like).items() if key not in _NOT_EXPORTED}
    config |= {"hidden_act": _ONLY["hidden_act"][0], "architectures": [family.architecture]}
    config |= {**family.constants, **values, **family.window_keys(model)}
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": model.rope_theta,
        **(scaling or {}),
    }
    config["dtype"] = config["torch_dtype"] = DTYPE_NAMES[dtype]
    return config


def without_code(document: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON document without the keys, at any depth, that make transformers run code."""
    return {key: _plain(value) for key, value in document.items() if not _runs_code(key, value)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return without_code(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _runs_code(key: str, value: Any) -> bool:
    """Return True for code keys, and for an attention implementation that names a repository."""
    return key in _CODE_KEYS or (key.endswith("_implementation") and "/" in str(value))


def check_nesting(document: Any, origin: str) -> None:
    """Raise CheckpointError, with `origin`, for a document too deep to be copied recursively."""
    level = [document]
    for _ in range(_MOST_LEVELS):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise CheckpointError(f"{origin}: lists or objects nested in more than {_MOST_LEVELS} levels")


def code_warnings(document: dict[str, Any], origin: str) -> list[str]:
    """Return a line that names the keys dropped by `without_code`, or none."""
    check_nesting(document, origin)
    names = sorted(set(_code_keys(document)))
    text = f"{origin}: dropped keys that make transformers run code: {', '.join(names)}"
    return [text] if names else []


def _code_keys(value: Any) -> list[str]:
    if isinstance(value, list):
        return [key for item in value for key in _code_keys(item)]
    if not isinstance(value, dict):
        return []
    here = [key for key, inner in value.items() if _runs_code(key, inner)]
    return here + [key for inner in value.values() for key in _code_keys(inner)]
