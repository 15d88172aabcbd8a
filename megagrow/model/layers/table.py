"""Parameter table of a model, assembled from the declarations of its layer types.

Sharding, initialization, growth, planning and the checkpoint formats derive from it. A new layer
type is a declaration and an entry in `decoder_blocks`.
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
    """A block of a decoder layer behind its norm."""

    norm: str
    name: str
    type: LayerType


_DECODER_BLOCKS = (
    BlockDeclaration("input_layernorm", "self_attn", ATTENTION),
    BlockDeclaration("post_attention_layernorm", "mlp", MLP),
)

_VOCABULARY = AxisRole(VOCAB, "produces")

EMBEDDING = ParameterDeclaration("model.embed_tokens", _VOCABULARY, WRITES_RESIDUAL, "normal")
HEAD = ParameterDeclaration("lm_head", _VOCABULARY, READS_RESIDUAL, "normal")
FINAL_NORM = "model.norm"


def decoder_blocks(config: ModelConfig, layer: int) -> tuple[BlockDeclaration, ...]:
    """Return the blocks of one decoder layer in the order of execution."""
    return _DECODER_BLOCKS


def block_counts(config: ModelConfig) -> Counter[BlockDeclaration]:
    """Return the number of occurrences of each block in a model."""
    layers = range(config.num_hidden_layers)
    return Counter(block for layer in layers for block in decoder_blocks(config, layer))


def norm_gain(name: str, tied: bool = False) -> ParameterDeclaration:
    """Return the gain of an RMSNorm; `tied` if the embedding matrix reads its output."""
    role = AxisRole(RESIDUAL, "tied gain" if tied else "gain")
    return ParameterDeclaration(name, role, None, "ones")


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
    final_gain = f"{FINAL_NORM}.weight"
    yield ModelParameter(f"{EMBEDDING.name}.weight", None, EMBEDDING)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm, block, layer_type in decoder_blocks(config, layer):
            gain = f"{prefix}.{norm}.weight"
            yield ModelParameter(gain, layer, norm_gain(norm))
            for each in layer_type.parameters(config):
                reads = gain if each.col_role == READS_RESIDUAL else None
                yield ModelParameter(f"{prefix}.{block}.{each.name}.weight", layer, each, reads)
    yield ModelParameter(final_gain, None, norm_gain(FINAL_NORM, tied))
    if not tied:
        yield ModelParameter(f"{HEAD.name}.weight", None, HEAD, final_gain)
