"""The arguments of Megatron-LM that say what model it is, and our config of the same model."""

from argparse import Namespace
from typing import Any

from megagrow.config.includes import checked_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError

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
    "num_experts": None,
    "multi_latent_attention": False,
    "pipeline_model_parallel_size": 1,
}
"""Arguments of which this Llama knows one value."""

_ROPE_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron-LM's use_rope_scaling stands for, besides its factor
(megatron/core/models/common/embeddings/rotary_pos_embedding.py)."""

_ROPE_FACTOR = 8.0
"""Where the arguments name none."""


def model_of(args: Namespace | None, origin: str) -> ModelConfig:
    """Our config of the model. InputError, naming `origin`, for what we have no model of."""
    if args is None:
        raise CheckpointError(
            f"{origin}: has no args that say what model it is; name it by --model"
        )
    found = dict(vars(args))
    if found.get("use_rotary_position_embeddings"):  # its older name
        found["position_embedding_type"] = "rope"
    for key, only in _ONLY.items():
        if found.get(key, only) not in (only, None):
            raise CheckpointError(f"{origin}: {key} = {found[key]!r}, only {only!r} is known here")
    found.setdefault("norm_epsilon", found.get("layernorm_epsilon"))
    if not found.get("group_query_attention"):
        found["num_query_groups"] = found.get("num_attention_heads")
    if found.get("vocab_size") is None:
        raise CheckpointError(
            f"{origin}: its args do not say vocab_size, only the padded one; name the model by "
            "--model"
        )
    values = {ours: found[key] for key, ours in _NAMES.items() if found.get(key) is not None}
    values["tie_word_embeddings"] = not found.get("untie_embeddings_and_output_weights", False)
    if found.get("use_rope_scaling"):
        factor = found.get("rope_scaling_factor", _ROPE_FACTOR)
        values["rope_scaling"] = _ROPE_SCALING | {"factor": factor}
    return checked_model(values, origin)


def args_of(model: ModelConfig, tp: int, divisible_by: int, padded_vocab: int) -> Namespace:
    """What Megatron-LM reads of a checkpoint's arguments (load_args_from_checkpoint).

    InputError if the model's rope scaling is none of its own.
    """
    scaling = {} if model.rope_scaling is None else model.rope_scaling.given()
    factor = scaling.pop("factor", _ROPE_FACTOR)
    if scaling not in ({}, _ROPE_SCALING):
        raise CheckpointError(f"rope_scaling {scaling}: Megatron-LM has only {_ROPE_SCALING}")
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
