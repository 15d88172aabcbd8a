"""Parameter table of a model, assembled from the declarations of its layer types.

Sharding, initialization, growth, planning and the checkpoint formats derive from it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.attention import ATTENTION
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    RESIDUAL,
    VOCAB,
    WRITES_RESIDUAL,
    ActivationAxis,
    AxisRole,
    LayerType,
    ParameterDeclaration,
)
from megagrow.model.layers.mlp import MLP


class BlockDeclaration(NamedTuple):
    """A block of a decoder layer and the norm that precedes it."""

    norm: str
    name: str
    type: LayerType


DECODER_BLOCKS = (
    BlockDeclaration("input_layernorm", "self_attn", ATTENTION),
    BlockDeclaration("post_attention_layernorm", "mlp", MLP),
)
"""Blocks of every decoder layer. A new layer type is registered here."""

EMBEDDING = ParameterDeclaration("model.embed_tokens.weight", VOCAB.produced, WRITES_RESIDUAL)
HEAD = ParameterDeclaration("lm_head.weight", VOCAB.produced, READS_RESIDUAL)
FINAL_NORM = "model.norm.weight"
EMBEDDING_MODULE, HEAD_MODULE = "model.embed_tokens", "lm_head"


def decoder_blocks(config: ModelConfig, layer: int) -> tuple[BlockDeclaration, ...]:
    """Return the blocks of one decoder layer in the order of execution."""
    return DECODER_BLOCKS


def block_counts(config: ModelConfig) -> Counter[BlockDeclaration]:
    """Return the number of occurrences of each block in a model."""
    layers = range(config.num_hidden_layers)
    return Counter(block for layer in layers for block in decoder_blocks(config, layer))


def norm_gain(name: str, tied: bool = False) -> ParameterDeclaration:
    """Return the gain of an RMSNorm; `tied` if the embedding matrix reads its output."""
    role = AxisRole(RESIDUAL, "tied gain" if tied else "gain")
    return ParameterDeclaration(name, role, None, "ones")


def indivisible_sizes(config: ModelConfig, tp: int) -> Iterator[tuple[str, int]]:
    """Yield (field, value) of the sizes that a tensor-parallel size must divide but does not.

    Each rank holds complete units of every sliced axis of a block. The vocabulary is padded.
    """
    axes = activation_axes(config).values()
    fields = (axis.sizes[0] for axis in axes if axis.sliced and axis != VOCAB)
    for field in dict.fromkeys(fields):
        value = getattr(config, field)
        if value % tp:
            yield field, value


def activation_axes(config: ModelConfig) -> dict[str, ActivationAxis]:
    """Return the axes of a model by name. Growth draws random numbers in this order."""
    declared = [each for block in block_counts(config) for each in block.type.parameters(config)]
    roles = [role for each in (*declared, EMBEDDING) for role in (each.row_role, each.col_role)]
    return {role.axis.name: role.axis for role in roles if role is not None}


@dataclass(frozen=True)
class ModelParameter:
    """A parameter of a model: its declaration and its position."""

    name: str
    layer: int | None
    declaration: ParameterDeclaration
    norm: str | None = None
    """Gain of the norm whose output the parameter reads."""


def model_parameters(config: ModelConfig) -> Iterator[ModelParameter]:
    """Yield all parameters in the order of the module tree; a tied head is not one of them."""
    tied = config.tie_word_embeddings
    yield ModelParameter(EMBEDDING.name, None, EMBEDDING)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm, block, layer_type in decoder_blocks(config, layer):
            gain = f"{prefix}.{norm}.weight"
            yield ModelParameter(gain, layer, norm_gain(f"{norm}.weight"))
            for each in layer_type.parameters(config):
                reads = gain if each.col_role == READS_RESIDUAL else None
                yield ModelParameter(f"{prefix}.{block}.{each.name}", layer, each, reads)
    yield ModelParameter(FINAL_NORM, None, norm_gain(FINAL_NORM, tied))
    if not tied:
        yield ModelParameter(HEAD.name, None, HEAD, FINAL_NORM)


def module_names(config: ModelConfig) -> list[str]:
    """Return the modules that hold all parameters, in the order of the forward pass.

    The weight of a tied `HEAD_MODULE` is `EMBEDDING`.
    """
    layers = (f"model.layers.{layer}" for layer in range(config.num_hidden_layers))
    return [EMBEDDING_MODULE, *layers, FINAL_NORM.removesuffix(".weight"), HEAD_MODULE]
