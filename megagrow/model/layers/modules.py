"""Modules of the layer types, for one device.

A block is sliced by tensor parallelism. Its `pre_collective` and `post_collective`, and the
placeholders `PartialSum` and `SharedWeight` within it, are identities that
`parallel/tensor_parallel.py` replaces.

Shapes: B batch, S sequence, D hidden size, F feed-forward width, H query heads, G key/value heads,
K head dimension, C channels of Mamba.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.decoding import DecodingState, KeyValueState
from megagrow.model.layers.linears import apply_linears
from megagrow.model.layers.recompute import Recomputed
from megagrow.model.masks import Masks, masked, masked_groups, masked_rms_norm
from megagrow.model.ops import Ops
from megagrow.model.own_gradients import widened


@dataclass(frozen=True)
class DocumentBounds:
    """Document boundaries of a micro-batch in the formats of the ops, computed on first use."""

    attention_mask: Callable[[int | None], Any]
    """(window or None) -> mask in the format `ops.attention` expects; the mask of
    `DecodedSequences.visible` if earlier passes stored a state."""
    starts: Callable[[], Tensor | None]
    """() -> (B, S) bool, True at the first token of each document; None if rows are not divided."""


@dataclass(frozen=True)
class Context:
    """Inputs of a block besides the hidden states, computed once per forward pass."""

    ops: Ops
    cos: Tensor
    sin: Tensor
    documents: DocumentBounds
    masks: Masks
    recompute: str
    """Activation checkpointing: `none`, `selective` (norms and SwiGLU) or `full` (the layer)."""
    state: DecodingState | None = None
    """State of the block in incremental decoding; None outside of it and for a type without one."""

    @property
    def selective(self) -> bool:
        """Return True if norms and SwiGLU are recomputed in the backward pass."""
        return self.recompute == "selective" and torch.is_grad_enabled()


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.weight_collective: nn.Module = nn.Identity()

    def forward(
        self, x_BSD: Tensor, context: Context, delta_BSD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of x + delta, and the sum; in one op if the backend has it."""
        weight = self.weight_collective(self.weight)
        ops, mask = context.ops, context.masks.residual
        if delta_BSD is not None:
            if ops.add_rms_norm is not None and mask is None:
                # Under autocast the hidden states have a wider dtype than the outputs of blocks.
                return ops.add_rms_norm(x_BSD, delta_BSD.to(x_BSD.dtype), weight, self.eps)
            x_BSD = x_BSD + delta_BSD
        return masked_rms_norm(ops, x_BSD, weight, self.eps, mask), x_BSD


class PartialSum(nn.Identity):
    """Placeholder for the sum over tensor-parallel ranks of values that each computes from its
    slice and all use: an all-reduce in the forward and in the backward pass."""


class SharedWeight(nn.Identity):
    """Placeholder for a weight that is not sliced, but multiplies sliced activations: its gradient
    is a sum over tensor-parallel ranks."""


class LayerModule(nn.Module):
    """Base class of the blocks of a decoder layer: forward(x_BSD, context) -> x_BSD.

    The input is the output of `pre_collective`, which the decoder layer calls. All weights are
    complete during the forward and backward pass of the block, also under ZeRO 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pre_collective: nn.Module = nn.Identity()
        self.post_collective: nn.Module = nn.Identity()

    def project_product(
        self, context: Context, gate: Tensor, up: Tensor, mask: Tensor | None, projection: nn.Linear
    ) -> Tensor:
        """Return the output of the block, the projection of silu(gate) * up * mask.

        With selective activation checkpointing the product is recomputed in the backward pass.
        """

        def product(gate: Tensor, up: Tensor) -> Tensor:
            return masked(context.ops.swiglu(gate, up), mask)

        if context.selective:
            hidden = Recomputed(product, gate, up)
            output = hidden.run()
            with hidden.reads(output):
                (out_BSD,) = apply_linears(output, projection)
        else:
            (out_BSD,) = apply_linears(product(gate, up), projection)
        return self.post_collective(out_BSD)


class HeadNorm(nn.Module):
    """RMSNorm of queries or keys (B, S, heads, K): over each head, with one gain for all heads, or
    over all heads, with a gain per entry (`qk_norm`)."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.per_head = config.qk_norm == "per_head"
        self.width = config.head_dim if self.per_head else heads * config.head_dim
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(self.width))
        self.weight_collective: nn.Module = SharedWeight() if self.per_head else nn.Identity()
        self.sum_collective: nn.Module = PartialSum()

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        weight = self.weight_collective(self.weight)
        if self.per_head:
            return ops.rms_norm(x, weight, self.eps)
        flat = x.flatten(2)
        if flat.shape[-1] == self.width:
            return ops.rms_norm(flat, weight, self.eps).view_as(x)
        wide = widened(flat)
        squares = self.sum_collective(wide.square().sum(-1, keepdim=True))
        norm = wide * torch.rsqrt(squares / self.width + self.eps) * weight
        return norm.to(x.dtype).view_as(x)


class Attention(LayerModule):
    """Causal self-attention, to the last `window` tokens if given. The number of local heads
    follows from the projections."""

    def __init__(self, config: ModelConfig, window: int | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = window
        width, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.head_dim, width, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            self.q_norm, self.k_norm = HeadNorm(config, heads), HeadNorm(config, kv_heads)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        ops, groups = context.ops, context.masks.groups
        projected = apply_linears(x_BSD, self.q_proj, self.k_proj, self.v_proj)
        q_BSHK, k_BSGK, v_BSGK = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHK, k_BSGK = self.q_norm(q_BSHK, ops), self.k_norm(k_BSGK, ops)
        q_BSHK, k_BSGK, v_BSGK = (masked_groups(x, groups) for x in (q_BSHK, k_BSGK, v_BSGK))
        q_BSHK, k_BSGK = ops.rope(q_BSHK, k_BSGK, context.cos, context.sin)
        attend = ops.attention
        if context.state is not None:
            assert isinstance(context.state, KeyValueState)
            attend = partial(context.state.attend, ops.attention)
        mask = context.documents.attention_mask(self.window)
        out_BSHK = attend(q_BSHK, k_BSGK, v_BSGK, mask)
        (out_BSD,) = apply_linears(out_BSHK.flatten(2), self.o_proj)
        return self.post_collective(out_BSD)


class MLP(LayerModule):
    """SwiGLU feed-forward block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        gate_BSF, up_BSF = apply_linears(x_BSD, self.gate_proj, self.up_proj)
        return self.project_product(context, gate_BSF, up_BSF, context.masks.ffn, self.down_proj)
