"""Declaration of causal self-attention: rotary positions, grouped queries, optional window, biases
and norms of queries and keys.

A group is one key/value head and its query heads. Growth adds complete groups; LiGO mixes complete
heads, which commutes with rotary positions (docs/reference/operators.md).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    LayerType,
    MicroBatch,
    ParameterDeclaration,
    ones,
    scaled_normal,
    zeros,
)

if TYPE_CHECKING:
    from megagrow.model.layers.decoding import DecodedSequences, DecodingState
    from megagrow.model.layers.modules import LayerModule

_QUERIES = ("num_attention_heads", "head_dim")
_KEYS = ("num_key_value_heads", "head_dim")

QUERY = ActivationAxis("query", _QUERIES, "num_key_value_heads", "head_dim")
KEY = ActivationAxis("key", _KEYS, "num_key_value_heads", "head_dim")
VALUE = ActivationAxis("value", _KEYS, "num_key_value_heads", "head_dim")
MIXED = ActivationAxis("mixed", _QUERIES, "num_key_value_heads", "head_dim")
"""Weighted sums of the values: the input of o_proj."""

HEAD_DIM = ActivationAxis("head_dim", ("head_dim",), None, sliced=False)
"""Entries of a head, for the norms that all heads share."""


def _parameters(config: ModelConfig) -> tuple[ParameterDeclaration, ...]:
    """Return the projections, and the biases and norms of the configuration.

    A full-width norm has one gain per query or key; its mean square is a sum over all heads.
    """
    found = []
    normed = config.qk_norm is not None
    query, key = (axis.normed if normed else axis.produced for axis in (QUERY, KEY))
    for name, role in (("q_proj", query), ("k_proj", key), ("v_proj", VALUE.produced)):
        found.append(ParameterDeclaration(f"{name}.weight", role, READS_RESIDUAL))
        if config.attention_bias:
            found.append(ParameterDeclaration(f"{name}.bias", role, None, zeros))
    found.append(
        ParameterDeclaration("o_proj.weight", WRITES_RESIDUAL, MIXED.consumed, scaled_normal)
    )
    if normed:
        for name, axis in (("q_norm", QUERY), ("k_norm", KEY)):
            scaled = HEAD_DIM if config.qk_norm == "per_head" else axis
            found.append(ParameterDeclaration(f"{name}.weight", scaled.produced, None, ones))
    return tuple(found)


def _score_flops(config: ModelConfig, sequence_length: int) -> int:
    """Return the training FLOPs per token of q k^T and of the weighted sum of v.

    Each takes 2 heads head_dim FLOPs per visible position in the forward pass and twice that in the
    backward pass: 12 heads head_dim per position (PaLM, arXiv 2204.02311, appendix B; Chinchilla,
    arXiv 2203.15556, appendix F). The papers count all S positions; a causal kernel processes
    (S + 1) / 2 on average, which is the count here. Activation checkpointing is not counted.
    """
    return 6 * MIXED.size(config) * (sequence_length + 1)


def _activation_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the bytes of q, k, v, the output and an fp32 normalizer per query.

    Norms of q and k also keep their inputs; a norm over the heads of several ranks keeps them and
    a product in fp32. The reference backend keeps the fp32 matrix of probabilities, repeated k and
    v, and the mask.
    """
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    per_head = batch.tokens * config.head_dim
    summed = 8 if config.qk_norm == "full_width" and batch.tp > 1 else batch.width
    normed = summed if config.qk_norm is not None else 0
    projections = (2 * batch.width + normed) * (queries + keys) * per_head
    if batch.attention != "reference":
        return projections + 4 * queries * batch.tokens
    operands = queries * per_head * (3 * 4 + batch.width)
    return operands + batch.tokens * batch.sequence_length * (4 * queries + batch.tp)


def _window_flops(config: ModelConfig, sequence_length: int) -> int:
    """Return `_score_flops` with the positions that a window of W leaves visible: on average
    W (2 S - W + 1) / (2 S) of a sequence of S > W."""
    assert config.sliding_window is not None
    window = min(config.sliding_window, sequence_length)
    visible_twice = window * (2 * sequence_length - window + 1)
    return 6 * MIXED.size(config) * visible_twice // sequence_length


def _build(config: ModelConfig) -> "LayerModule":
    from megagrow.model.layers.modules import Attention

    return Attention(config)


def _build_with_window(config: ModelConfig) -> "LayerModule":
    from megagrow.model.layers.modules import Attention

    return Attention(config, config.sliding_window)


def _decoding_state(sequences: "DecodedSequences") -> "DecodingState":
    from megagrow.model.layers.decoding import KeyValueState

    return KeyValueState(sequences)


ATTENTION = LayerType(
    "self_attn",
    label="attention's projections",
    parameters=_parameters,
    activation_bytes=_activation_bytes,
    build=_build,
    score_label="attention itself",
    score_flops=_score_flops,
    decoding_state=_decoding_state,
)

SLIDING_ATTENTION = replace(ATTENTION, build=_build_with_window, score_flops=_window_flops)
"""Attention to the last `sliding_window` tokens."""
