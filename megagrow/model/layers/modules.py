"""Modules of the layer types, for one device.

A block is sliced by tensor parallelism. Its `pre_collective` and `post_collective` are identities
that `parallel/tensor_parallel.py` replaces.

Shapes: B batch, S sequence, D hidden size, F feed-forward width, H query heads, G key/value heads,
K head dimension.
"""

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


@dataclass(frozen=True)
class Context:
    """Inputs of a block besides the hidden states, computed once per forward pass."""

    ops: Ops
    cos: Tensor
    sin: Tensor
    attention_mask: Any
    """Attention mask in the format `ops.attention` expects; the mask of `DecodedSequences.visible`
    if earlier passes stored a state."""
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


class LayerModule(nn.Module):
    """Base class of the blocks of a decoder layer: forward(x_BSD, context) -> x_BSD.

    The input is the output of `pre_collective`, which the decoder layer calls. All weights are
    complete during the forward and backward pass of the block, also under ZeRO 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pre_collective: nn.Module = nn.Identity()
        self.post_collective: nn.Module = nn.Identity()


class Attention(LayerModule):
    """Causal self-attention. The number of local heads follows from the projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, width, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        ops, groups = context.ops, context.masks.groups
        projected = apply_linears(x_BSD, self.q_proj, self.k_proj, self.v_proj)
        q_BSHK, k_BSGK, v_BSGK = (self._heads(each, groups) for each in projected)
        q_BSHK, k_BSGK = ops.rope(q_BSHK, k_BSGK, context.cos, context.sin)
        attend = ops.attention
        if context.state is not None:
            assert isinstance(context.state, KeyValueState)
            attend = partial(context.state.attend, ops.attention)
        out_BSHK = attend(q_BSHK, k_BSGK, v_BSGK, context.attention_mask)
        (out_BSD,) = apply_linears(out_BSHK.flatten(2), self.o_proj)
        return self.post_collective(out_BSD)

    def _heads(self, x: Tensor, mask_G: Tensor | None) -> Tensor:
        return masked_groups(x.unflatten(-1, (-1, self.head_dim)), mask_G)


class MLP(LayerModule):
    """SwiGLU feed-forward block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        gate_BSF, up_BSF = apply_linears(x_BSD, self.gate_proj, self.up_proj)
        if context.selective:
            hidden = Recomputed(partial(self._hidden, context), gate_BSF, up_BSF)
            hidden_BSF = hidden.run()
            with hidden.reads(hidden_BSF):
                (out_BSD,) = apply_linears(hidden_BSF, self.down_proj)
        else:
            hidden_BSF = self._hidden(context, gate_BSF, up_BSF)
            (out_BSD,) = apply_linears(hidden_BSF, self.down_proj)
        return self.post_collective(out_BSD)

    def _hidden(self, context: Context, gate_BSF: Tensor, up_BSF: Tensor) -> Tensor:
        return masked(context.ops.swiglu(gate_BSF, up_BSF), context.masks.ffn)
