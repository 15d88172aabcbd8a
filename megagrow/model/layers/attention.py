"""Declaration of causal self-attention: rotary positions, grouped queries, optional window, biases
and norms of queries and keys.

A group is one key/value head and its query heads. Growth adds complete groups; LiGO mixes complete
heads, which commutes with rotary positions (docs/reference/operators.md).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    LayerType,
    ParameterDeclaration,
    ones,
    scaled_normal,
    zeros,
)
from megagrow.model.layers.costs import (
    ContextElements,
    KernelArguments,
    KernelInputs,
    MicroBatch,
    RowElements,
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
    """Return the bytes of q, k, v, the output, an fp32 normalizer per query, and of norms.

    The reference backend keeps the fp32 matrix of probabilities, repeated k and v, and the mask.
    With context parallelism k and v are those of all ranks, unless heads are exchanged, and the
    output is kept in two orders.
    """
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    per_head = batch.tokens * config.head_dim
    gathered = batch.cp if batch.cp_comm_type == "all_gather" else 1
    outputs = 1 if batch.cp == 1 else 2
    norms = (queries + keys) * per_head * _norm_width(config, batch)
    if batch.attention != "reference":
        operands = ((1 + outputs) * queries + 2 * gathered * keys) * per_head * batch.width
        return norms + operands + 4 * queries * batch.tokens
    operands = queries * per_head * (4 + 2 * 4 * gathered + outputs * batch.width)
    return norms + operands + batch.tokens * batch.sequence_length * (4 * queries + batch.tp)


def _norm_width(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the bytes that norms of queries and keys keep per entry.

    A norm keeps its input. A sum of squares over ranks keeps it and the quotient in fp32.
    """
    if config.qk_norm is None:
        return 0
    return 8 if config.qk_norm == "full_width" and batch.tp > 1 else batch.width


def _window_flops(config: ModelConfig, sequence_length: int) -> int:
    """Return `_score_flops` with the positions that a window of W leaves visible: on average
    W (2 S - W + 1) / (2 S) of a sequence of S > W."""
    assert config.sliding_window is not None
    window = min(config.sliding_window, sequence_length)
    visible_twice = window * (2 * sequence_length - window + 1)
    return 6 * MIXED.size(config) * visible_twice // sequence_length


def _score_products(config: ModelConfig, sequence_length: int, masked: int) -> int:
    return _score_flops(config, sequence_length) + 12 * MIXED.size(config) * masked


def _window_products(config: ModelConfig, sequence_length: int, masked: int) -> int:
    """Return the products of a kernel that skips blocks outside of the window.

    The visible positions have two edges if the window is shorter than the sequence.
    """
    assert config.sliding_window is not None
    edges = 2 if config.sliding_window < sequence_length else 1
    visible = _window_flops(config, sequence_length)
    return visible + edges * 12 * MIXED.size(config) * masked


def _context_elements(config: ModelConfig, tp: int, cp_comm_type: str) -> ContextElements:
    """Return the elements of k and v, or of q, k, v and the output."""
    keys = 2 * KEY.size(config) // tp
    if cp_comm_type == "all_gather":
        return ContextElements(gathered=keys)
    return ContextElements(exchanged=2 * QUERY.size(config) // tp + keys)


def _partial_sums(config: ModelConfig, width: int) -> int:
    """Return the bytes of the fp32 sums of squares of full-width norms of queries and keys."""
    return 2 * 4 if config.qk_norm == "full_width" else 0


def _row_elements(config: ModelConfig) -> RowElements:
    """Return the traffic of rotary positions, and of norms of queries and keys.

    A norm reads and writes an element; its backward pass reads two and writes one.
    """
    entries, norms = QUERY.size(config) + KEY.size(config), int(config.qk_norm is not None)
    return RowElements((2 + 2 * norms) * entries, (2 + 3 * norms) * entries)


def _kernel_calls(
    config: ModelConfig, inputs: KernelInputs, **window: int
) -> Iterator[KernelArguments]:
    """Yield the norms, the rotation and attention.

    A full-width norm of sliced heads is computed by torch: its mean square is a sum over ranks.
    """
    heads = config.num_attention_heads // inputs.tp
    groups = config.num_key_value_heads // inputs.tp
    for count in (heads, groups):
        norm = {"dtype": inputs.dtype, "parameter_dtype": inputs.parameter_dtype}
        if config.qk_norm == "per_head":
            yield "rms_norm", {"rows": inputs.rows * count, "width": config.head_dim, **norm}
        elif config.qk_norm is not None and inputs.tp == 1:
            yield "rms_norm", {"rows": inputs.rows, "width": count * config.head_dim, **norm}
    shape = {
        **{"batch": inputs.batch, "sequence": inputs.local_sequence},
        **{"heads": heads, "groups": groups, "head_dim": config.head_dim},
    }
    yield "rope", {**shape, "dtype": inputs.dtype, "table_dtype": inputs.parameter_dtype}
    for part in _attention_parts(inputs, heads, groups):
        yield "attention", {**shape, **part, "dtype": inputs.dtype, **window}


def _attention_parts(inputs: KernelInputs, heads: int, groups: int) -> Iterator[dict[str, int]]:
    """Yield the sizes of the calls of attention that differ under context parallelism.

    With gathered keys they are those of the first and the last chunk of queries; the numbers of
    keys of the others are in between.
    """
    if inputs.cp == 1:
        yield {}
    elif inputs.cp_comm_type == "a2a":
        sizes = {"heads": heads // inputs.cp, "groups": groups // inputs.cp}
        yield {"sequence": inputs.sequence, **sizes}
    else:
        size = inputs.sequence // (2 * inputs.cp)
        yield {"sequence": size}
        yield {"sequence": inputs.sequence, "queries": size}


def _window_calls(config: ModelConfig, inputs: KernelInputs) -> Iterator[KernelArguments]:
    assert config.sliding_window is not None
    return _kernel_calls(config, inputs, window=config.sliding_window)


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
    row_elements=_row_elements,
    kernel_calls=_kernel_calls,
    score_label="attention itself",
    score_flops=_score_flops,
    score_products=_score_products,
    context_elements=_context_elements,
    partial_sums=_partial_sums,
    joint_inputs=True,
    decoding_state=_decoding_state,
)

SLIDING_ATTENTION = replace(
    ATTENTION,
    build=_build_with_window,
    kernel_calls=_window_calls,
    score_flops=_window_flops,
    score_products=_window_products,
)
"""Attention to the last `sliding_window` tokens."""
