"""Decoder-only language model of typed layers: embedding, decoder layers, final norm, head.

The blocks of a layer follow from the configuration (`layers/table.py`). Parameter names and shapes
are those of Hugging Face's models of the same family. The model is written for one device: tensor
parallelism replaces every Identity named `pre_collective` or `post_collective` by a collective
(`parallel/tensor_parallel.py`).

Shapes: B batch, S sequence, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache as cached
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagrow.config.schema import ModelConfig
from megagrow.model.decoding import DecodingCache
from megagrow.model.layers.decoding import DecodingState
from megagrow.model.layers.modules import Context, DocumentBounds, LayerModule, RMSNorm
from megagrow.model.layers.recompute import Recomputed
from megagrow.model.layers.table import decoder_blocks
from megagrow.model.masks import Masks, masked
from megagrow.model.ops import PLAIN, Ops
from megagrow.model.rope import rotary_tables


class DecoderLayer(nn.Module):
    """Blocks of one layer. Each reads the residual stream and adds its output to it.

    A norm precedes or follows each block (`norm_position`). forward(x, context, delta) starts with
    the addition of the last output before it, which may be part of a norm, and returns (x, delta)
    without the addition of its own last output.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        blocks = decoder_blocks(config, index)
        for block in blocks:
            self.add_module(block.norm, RMSNorm(config.hidden_size, config.rms_norm_eps))
            self.add_module(block.name, block.type.build(config))
        self.blocks = [(block.norm, block.name) for block in blocks]
        self.run_block = _norm_first if config.norm_position == "pre" else _norm_last

    def forward(
        self,
        x_BSD: Tensor,
        context: Context,
        delta_BSD: Tensor | None = None,
        gate: Tensor | float | None = None,
        states: Mapping[str, DecodingState] | None = None,
    ) -> tuple[Tensor, Tensor]:
        for norm, name in self.blocks:
            own = context if states is None else replace(context, state=states.get(name))
            modules = getattr(self, norm), getattr(self, name)
            output_BSD, x_BSD = self.run_block(*modules, x_BSD, delta_BSD, own)
            delta_BSD = masked(output_BSD, gate)
        assert delta_BSD is not None
        return x_BSD, delta_BSD


def _norm_first(
    normalize: RMSNorm,
    block: LayerModule,
    x_BSD: Tensor,
    delta_BSD: Tensor | None,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """Return the block's output on the norm of x + delta, and that sum."""
    norm_BSD, x_BSD = normalize(x_BSD, context, delta_BSD)
    input_BSD = block.pre_collective(norm_BSD)
    again = Recomputed(partial(_normalized_input, normalize, block, context), x_BSD)
    with again.reads(input_BSD) if context.selective else nullcontext():
        return block(input_BSD, context), x_BSD


def _normalized_input(
    normalize: RMSNorm, block: LayerModule, context: Context, x_BSD: Tensor
) -> Tensor:
    """Return the input of a block from the residual stream.

    Called in the backward pass, so without module hooks: those of ZeRO 3 would count it as another
    forward pass. The gain is there, because ZeRO 3 keeps vectors gathered until the update.
    """
    norm_BSD, _ = normalize.forward(x_BSD, context)
    return block.pre_collective.forward(norm_BSD)


def _norm_last(
    normalize: RMSNorm,
    block: LayerModule,
    x_BSD: Tensor,
    delta_BSD: Tensor | None,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """Return the norm of the block's output on x + delta, and that sum."""
    if delta_BSD is not None:
        x_BSD = x_BSD + delta_BSD
    output_BSD = block(block.pre_collective(x_BSD), context)
    return normalize(output_BSD, context)[0], x_BSD


class ModelChunk(NamedTuple):
    """Consecutive layers of a model; the first chunk also has the embedding, the last one the final
    norm and the head."""

    layers: range
    is_first: bool
    is_last: bool


def complete(config: ModelConfig) -> ModelChunk:
    """Return the chunk with all layers of a model."""
    return ModelChunk(range(config.num_hidden_layers), True, True)


class DecoderModel(nn.Module):
    """Token ids to normalized hidden states, or the chunks of this function on one rank."""

    def __init__(
        self, config: ModelConfig, recompute: str, ops: Ops, chunks: Sequence[ModelChunk]
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.ops = ops
        if any(chunk.is_first for chunk in chunks):
            self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_collective: nn.Module = nn.Identity()
        held = (index for chunk in chunks for index in chunk.layers)
        self.layers = nn.ModuleDict({str(index): DecoderLayer(config, index) for index in held})
        if any(chunk.is_last for chunk in chunks):
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        documents: Any,
        masks: Masks | None,
        cache: DecodingCache | None,
        chunk: ModelChunk,
    ) -> Tensor:
        x_BSD = self.post_collective(self.embed_tokens(inputs)) if chunk.is_first else inputs
        masks = Masks() if masks is None else masks.to(x_BSD.dtype)
        if chunk.is_first:
            x_BSD = masked(x_BSD, masks.residual)
        context = self._context(position_ids, documents, masks, x_BSD.dtype, cache)
        delta_BSD: Tensor | None = None
        for index in chunk.layers:
            layer, gate = self.layers[str(index)], masks.gate(index)
            if self.recompute == "full" and torch.is_grad_enabled():
                # Add at once: the layer's inputs are kept.
                x_BSD = x_BSD if delta_BSD is None else x_BSD + delta_BSD
                arguments = (x_BSD, context, None, gate)
                x_BSD, delta_BSD = checkpoint(layer, *arguments, use_reentrant=True)
            else:
                states = None if cache is None else cache.states(index)
                x_BSD, delta_BSD = layer(x_BSD, context, delta_BSD, gate, states)
        if not chunk.is_last:
            return x_BSD if delta_BSD is None else x_BSD + delta_BSD
        norm_BSD, _ = self.norm(x_BSD, context, delta_BSD)
        return norm_BSD

    def _context(
        self,
        positions: Tensor,
        documents: Any,
        masks: Masks,
        dtype: torch.dtype,
        cache: DecodingCache | None,
    ) -> Context:
        cos, sin = rotary_tables(self.config, positions)

        def attention_mask(window: int | None) -> Any:
            if cache is not None and cache.sequences.stored > 0:
                return cache.sequences.visible(positions, window)
            return self.ops.attention_mask(documents, positions, window)

        def starts() -> Tensor | None:
            return self.ops.document_starts(documents, positions)

        boundaries = DocumentBounds(cached(attention_mask), cached(starts))
        return Context(self.ops, cos.to(dtype), sin.to(dtype), boundaries, masks, self.recompute)


HeadLoss = Callable[[Tensor, Tensor], Tensor]
"""Loss computed in place of the logits, from the hidden states (B, S, D) and the head's weight, the
local rows of the vocabulary (V, D)."""


class Head(nn.Linear):
    """Hidden states to logits or to a loss. ZeRO 3 gathers the weight only in `forward`."""

    def forward(self, x_BSD: Tensor, loss: HeadLoss | None = None) -> Tensor:
        return F.linear(x_BSD, self.weight) if loss is None else loss(x_BSD, self.weight)


class CausalLM(nn.Module):
    """Token ids to logits, or to a loss.

    forward(inputs, position_ids, documents, masks, loss, cache, chunk): the first two are token ids
    and positions (B, S) int64. A pass computes one chunk of the model. A chunk that is not the
    first one reads hidden states (B, S, D) as `inputs`, and one that is not the last one returns
    them; with sequence parallelism they are the local part of the sequence.
    `documents` is the output of `ops.pack`, None if attention crosses document boundaries. `masks`
    is None unless growth masks are ramping. With `cache`, the inputs continue its sequences and
    `documents` is None. Returns logits (B, S, V) with V the local rows of the vocabulary, or the
    value of `loss` on the hidden states and the head.
    """

    def __init__(
        self,
        config: ModelConfig,
        recompute: str = "none",
        ops: Ops = PLAIN,
        chunks: Sequence[ModelChunk] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.chunks = tuple(chunks or (complete(config),))
        self.model = DecoderModel(config, recompute, ops, self.chunks)
        self.pre_collective: nn.Module = nn.Identity()
        if not any(chunk.is_last for chunk in self.chunks):
            return
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings and any(chunk.is_first for chunk in self.chunks):
            self.lm_head.weight = self.model.get_parameter("embed_tokens.weight")

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        documents: Any = None,
        masks: Masks | None = None,
        loss: HeadLoss | None = None,
        cache: DecodingCache | None = None,
        chunk: ModelChunk | None = None,
    ) -> Tensor:
        chunk = chunk or self.chunks[0]
        x_BSD = self.model(inputs, position_ids, documents, masks, cache, chunk)
        if not chunk.is_last:
            return x_BSD
        x_BSD = self.pre_collective(x_BSD)
        return self.lm_head(x_BSD, loss)
