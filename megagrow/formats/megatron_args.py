"""Conversion between Megatron-LM's model arguments and ModelConfig."""

from argparse import Namespace
from typing import Any

from megagrow.config.model_file import checked_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face_families import other_feature

_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
}

_ONLY: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "qk_layernorm": False,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "pipeline_model_parallel_size": 1,
}
"""Arguments with a single supported value, which is written to exported files."""

_ONLY_READ: dict[str, Any] = {"softmax_type": "vanilla"}
"""Arguments with a single supported value that exported files do not need."""

_OFF = (
    *("num_experts", "num_moe_experts", "qk_l2_norm"),
    *("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
    *("experimental_attention_variant", "linear_attention_type"),
    *("attention_output_gate", "head_wise_attn_gate", "softmax_scale", "window_size"),
    *("no_rope_freq", "rotary_base_per_layer", "glu_linear_offset", "squared_relu", "quick_geglu"),
    *("activation_func_clamp_value", "use_mup", "mtp_num_layers", "mtp_hybrid_override_pattern"),
    *("hybrid_layer_pattern", "hybrid_override_pattern", "heterogeneous_layers_config_path"),
    *("enable_hyper_connections", "retro_add_retriever", "virtual_pipeline_model_parallel_size"),
)
"""Arguments that change the function or the tensors unless they are absent, None, False or zero."""

_ROPE_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Settings implied by Megatron-LM's use_rope_scaling, in addition to its factor
(megatron/core/models/common/embeddings/rotary_pos_embedding.py)."""

_ROPE_FACTOR = 8.0
"""Default factor of use_rope_scaling."""


_FREE = ("initializer_range", "max_position_embeddings")
"""Model fields that do not affect the weights."""

_DROPOUTS = ("hidden_dropout", "attention_dropout")


def model_of(args: Namespace | None, origin: str) -> ModelConfig:
    """Convert the arguments. Raises CheckpointError, with `origin`, for unsupported models."""
    if args is None:
        raise CheckpointError(f"{origin}: has no model arguments; pass the model with --model")
    values = _model_values(args, origin)
    if "vocab_size" not in values:
        raise CheckpointError(
            f"{origin}: its arguments lack vocab_size, they only have the padded one; pass the "
            "model with --model"
        )
    return checked_model(values, origin)


def check_model(args: Namespace, model: ModelConfig, origin: str) -> None:
    """Raise CheckpointError, with `origin`, if the arguments are of another model."""
    given = model.model_dump()
    if model.rope_scaling is not None:
        given["rope_scaling"] = model.rope_scaling.given()
    for key, value in _model_values(args, origin).items():
        if given[key] != value and key not in _FREE:
            raise CheckpointError(
                f"{origin}: its arguments have {key} = {value}, the model given with --model has "
                f"{given[key]}"
            )


def args_warnings(args: Namespace | None, origin: str) -> list[str]:
    """Return a line for every argument that affects training and is not followed."""
    values = {} if args is None else vars(args)
    return [
        f"{origin}: {key} = {values[key]!r:.200}, but megagrow trains without dropout"
        for key in _DROPOUTS
        if values.get(key)
    ]


def _model_values(args: Namespace, origin: str) -> dict[str, Any]:
    """Return the fields of ModelConfig that the arguments determine.

    Raises CheckpointError for arguments with an effect that ModelConfig cannot express.
    """
    values_of = dict(vars(args))
    if values_of.get("use_rotary_position_embeddings"):  # older name
        values_of["position_embedding_type"] = "rope"
    wrong = {
        key: only
        for key, only in (_ONLY | _ONLY_READ).items()
        if values_of.get(key, only) not in (only, None)
    }
    wrong |= {key: None for key in _OFF if values_of.get(key)}
    for key, only in wrong.items():
        value = f"{values_of[key]!r:.200}"
        raise CheckpointError(f"{origin}: {key} = {value}, only {only!r} is supported")
    values_of.setdefault("norm_epsilon", values_of.get("layernorm_epsilon"))
    if not values_of.get("group_query_attention"):
        values_of["num_query_groups"] = values_of.get("num_attention_heads")
    values = {
        ours: values_of[key] for key, ours in _NAMES.items() if values_of.get(key) is not None
    }
    values["tie_word_embeddings"] = not values_of.get("untie_embeddings_and_output_weights", False)
    values["rope_scaling"] = None
    if values_of.get("use_rope_scaling"):
        factor = values_of.get("rope_scaling_factor", _ROPE_FACTOR)
        values["rope_scaling"] = _ROPE_SCALING | {"factor": factor}
    return values


def check_features(model: ModelConfig) -> None:
    """Raise CheckpointError for a model that has features besides those of Llama."""
    if key := other_feature(model, "llama"):
        raise CheckpointError(
            f"model.{key} = {getattr(model, key)}: megagrow supports the Megatron-LM format only "
            "for Llama models"
        )


def args_of(model: ModelConfig, tp: int, divisible_by: int, padded_vocab: int) -> Namespace:
    """Return the arguments that Megatron-LM reads from a checkpoint (load_args_from_checkpoint).

    Raises CheckpointError for features besides those of Llama, and if Megatron-LM does not support
    the model's rope scaling.
    """
    check_features(model)
    scaling = {} if model.rope_scaling is None else model.rope_scaling.given()
    factor = scaling.pop("factor", _ROPE_FACTOR)
    if scaling not in ({}, _ROPE_SCALING):
        raise CheckpointError(f"rope_scaling {scaling}: Megatron-LM supports only {_ROPE_SCALING}")
    values = model.model_dump()
    args: dict[str, Any] = {key: values[ours] for key, ours in _NAMES.items()}
    args |= {key: only for key, only in _ONLY.items() if only is not None}
    return Namespace(
        **args,
        group_query_attention=model.num_key_value_heads != model.num_attention_heads,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        use_rotary_position_embeddings=True,
        use_rope_scaling=bool(scaling),
        rope_scaling_factor=factor,
        seq_length=model.max_position_embeddings,
        tensor_model_parallel_size=tp,
        make_vocab_size_divisible_by=divisible_by,
        padded_vocab_size=padded_vocab,
    )
