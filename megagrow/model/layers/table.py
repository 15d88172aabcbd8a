"""Parameter table of a model, assembled from the declarations of its layer types.

Sharding, initialization, growth, planning and the checkpoint formats derive from it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.attention import ATTENTION, SLIDING_ATTENTION
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    RESIDUAL,
    VOCAB,
    WRITES_RESIDUAL,
    ActivationAxis,
    AxisRole,
    LayerType,
    ParameterDeclaration,
    ones,
)
from megagrow.model.layers.mamba import MAMBA
from megagrow.model.layers.mlp import MLP


class BlockDeclaration(NamedTuple):
    """A block of a decoder layer, and the norm of its input or output (`norm_position`)."""

    norm: str
    type: LayerType

    @property
    def name(self) -> str:
        """Return the name of the block's module."""
        return self.type.name


MIXERS: dict[str, LayerType] = {
    "full_attention": ATTENTION,
    "sliding_attention": SLIDING_ATTENTION,
    "mamba": MAMBA,
}
"""First block of a decoder layer, by `layer_types`. A new layer type is registered here."""

FEED_FORWARD = MLP
"""Second block of every decoder layer."""

_NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Hugging Face's names of the norms of both blocks, by `norm_position`."""

EMBEDDING = ParameterDeclaration("model.embed_tokens.weight", VOCAB.produced, WRITES_RESIDUAL)
HEAD = ParameterDeclaration("lm_head.weight", VOCAB.produced, READS_RESIDUAL)
FINAL_NORM = "model.norm.weight"
EMBEDDING_MODULE, HEAD_MODULE = "model.embed_tokens", "lm_head"


def decoder_blocks(config: ModelConfig, layer: int) -> tuple[BlockDeclaration, ...]:
    """Return the blocks of one decoder layer in the order of execution."""
    types = MIXERS[config.layer_type(layer)], FEED_FORWARD
    return tuple(map(BlockDeclaration, _NORMS[config.norm_position], types))


def distinct_layers(config: ModelConfig) -> tuple[tuple[BlockDeclaration, ...], ...]:
    """Return the blocks of each kind of decoder layer in a model, in order of first occurrence.

    They follow from `layer_types`, so that a model without layers has the axes of those it grows.
    """
    layers = (decoder_blocks(config, layer) for layer in range(len(config.layer_types)))
    return tuple(dict.fromkeys(layers))


def distinct_blocks(config: ModelConfig) -> tuple[BlockDeclaration, ...]:
    """Return each kind of block of `distinct_layers`, in order of first occurrence."""
    return tuple(dict.fromkeys(block for layer in distinct_layers(config) for block in layer))


def block_counts(
    config: ModelConfig, layers: Iterable[int] | None = None
) -> Counter[BlockDeclaration]:
    """Return the number of occurrences of each block in some layers, by default in a model."""
    layers = range(config.num_hidden_layers) if layers is None else layers
    return Counter(block for layer in layers for block in decoder_blocks(config, layer))


def norm_gain(name: str, tied: bool = False) -> ParameterDeclaration:
    """Return the gain of an RMSNorm; `tied` if the embedding matrix reads its output."""
    role = AxisRole(RESIDUAL, "tied gain" if tied else "gain")
    return ParameterDeclaration(name, role, None, ones)


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
    blocks = distinct_blocks(config)
    declared = [each for block in blocks for each in block.type.parameters(config)]
    roles = [role for each in (*declared, EMBEDDING) for role in (each.row_role, each.col_role)]
    return {role.axis.name: role.axis for role in roles if role is not None}


def width_fields(config: ModelConfig) -> tuple[str, ...]:
    """Return the fields of the configuration that define the width, without the vocabulary."""
    axes = [axis for axis in activation_axes(config).values() if axis != VOCAB and axis.grown_by]
    fields = {field for axis in axes for field in (axis.grown_by, axis.sizes[0])}
    return tuple(field for field in ModelConfig.model_fields if field in fields)


@dataclass(frozen=True)
class ModelParameter:
    """A parameter of a model: its declaration and its position."""

    name: str
    layer: int | None
    declaration: ParameterDeclaration
    norm: str | None = None
    """Gain of the norm whose output the parameter reads."""
    silences: bool = False
    """True if the block adds nothing to the residual stream while the parameter is zero: the last
    projection, or the gain of the norm that follows it."""


def model_parameters(config: ModelConfig) -> Iterator[ModelParameter]:
    """Yield all parameters in the order of the module tree; a tied head is not one of them."""
    tied = config.tie_word_embeddings
    yield ModelParameter(EMBEDDING.name, None, EMBEDDING)
    for layer in range(config.num_hidden_layers):
        for block in decoder_blocks(config, layer):
            yield from _block_parameters(config, layer, block)
    yield ModelParameter(FINAL_NORM, None, norm_gain(FINAL_NORM, tied))
    if not tied:
        yield ModelParameter(HEAD.name, None, HEAD, FINAL_NORM)


def _block_parameters(
    config: ModelConfig, layer: int, block: BlockDeclaration
) -> Iterator[ModelParameter]:
    prefix, before = f"model.layers.{layer}", config.norm_position == "pre"
    gain = f"{prefix}.{block.norm}.weight"
    yield ModelParameter(gain, layer, norm_gain(f"{block.norm}.weight"), silences=not before)
    for each in block.type.parameters(config):
        reads = gain if before and each.col_role == READS_RESIDUAL else None
        last = before and each.row_role == WRITES_RESIDUAL
        yield ModelParameter(f"{prefix}.{block.name}.{each.name}", layer, each, reads, last)


def module_names(config: ModelConfig) -> list[str]:
    """Return the modules that hold all parameters, in the order of the forward pass.

    The weight of a tied `HEAD_MODULE` is `EMBEDDING`.
    """
    layers = (f"model.layers.{layer}" for layer in range(config.num_hidden_layers))
    return [EMBEDDING_MODULE, *layers, FINAL_NORM.removesuffix(".weight"), HEAD_MODULE]
