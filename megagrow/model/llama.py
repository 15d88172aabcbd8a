"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU; no bias, no dropout.

Parameter names and shapes are those of Hugging Face's LlamaForCausalLM. The model is written for
one device. Where tensor parallelism needs a collective stands an Identity called `enter` or
`leave`; `parallel/layers.py` puts the collective in its place.

Shapes: B batch, S sequence, D hidden size, H query heads, G key/value heads, K head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagrow.config.schema import ModelConfig
from megagrow.model.masks import Masks, masked, masked_groups, masked_rms_norm
from megagrow.model.ops import PLAIN, Ops
from megagrow.model.rope import rotary_tables


@dataclass(frozen=True)
class Context:
    """What every layer needs besides the hidden states, computed once per forward pass."""

    ops: Ops
    cos: Tensor
    sin: Tensor
    attention_mask: Any
    """What each query may see, as `ops.attention` takes it."""
    masks: Masks
    recompute: str
    """`none`, `selective` (the attention core) or `full` (the whole layer)."""

    @property
    def adds_in_norm(self) -> bool:
        """Whether a norm does the addition before it too: none does so in a masked model."""
        return self.ops.add_rms_norm is not None and self.masks.residual is None


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.weight_collective: nn.Module = nn.Identity()

    def forward(
        self, x_BSD: Tensor, context: Context, delta_BSD: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with `more`, the norm of x + more and that sum, by the op that does both
        at once."""
        weight = self.weight_collective(self.weight)
        if delta_BSD is None:
            mask = context.masks.residual
            return masked_rms_norm(context.ops, x_BSD, weight, self.eps, mask)
        assert context.ops.add_rms_norm is not None
        # Under autocast hidden states are wider than what layers give.
        delta_BSD = delta_BSD.to(x_BSD.dtype)
        return context.ops.add_rms_norm(x_BSD, delta_BSD, weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention; the number of heads held here follows from the projections."""

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
        self.pre_collective: nn.Module = nn.Identity()
        self.post_collective: nn.Module = nn.Identity()

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        x_BSD = self.pre_collective(x_BSD)
        ops, groups = context.ops, context.masks.groups
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_BSHK, k_BSGK, v_BSGK = (self._heads(project(x_BSD), groups) for project in projections)
        q_BSHK, k_BSGK = ops.rope(q_BSHK, k_BSGK, context.cos, context.sin)
        attend = ops.attention
        if context.recompute == "selective" and torch.is_grad_enabled():
            attend = partial(checkpoint, ops.attention, use_reentrant=False)
        out_BSHK = attend(q_BSHK, k_BSGK, v_BSGK, context.attention_mask)
        return self.post_collective(self.o_proj(out_BSHK.flatten(2)))

    def _heads(self, x: Tensor, mask_G: Tensor | None) -> Tensor:
        return masked_groups(x.unflatten(-1, (-1, self.head_dim)), mask_G)


class MLP(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.pre_collective: nn.Module = nn.Identity()
        self.post_collective: nn.Module = nn.Identity()

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        x_BSD = self.pre_collective(x_BSD)
        hidden_BSF = context.ops.swiglu(self.gate_proj(x_BSD), self.up_proj(x_BSD))
        return self.post_collective(self.down_proj(masked(hidden_BSF, context.masks.ffn)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BSD: Tensor, context: Context, gate: Tensor | float | None = None
    ) -> Tensor:
        norm_BSD = self.input_layernorm(x_BSD, context)
        delta_BSD = masked(self.self_attn(norm_BSD, context), gate)
        if context.adds_in_norm:
            norm_BSD, x_BSD = self.post_attention_layernorm(x_BSD, context, delta_BSD)
        else:
            x_BSD = x_BSD + delta_BSD
            norm_BSD = self.post_attention_layernorm(x_BSD, context)
        return x_BSD + masked(self.mlp(norm_BSD, context), gate)


class LlamaModel(nn.Module):
    """Token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig, recompute: str = "none", ops: Ops = PLAIN) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.ops = ops
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_collective: nn.Module = nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Any = None,
        masks: Masks | None = None,
    ) -> Tensor:
        x_BSD = self.post_collective(self.embed_tokens(input_ids))
        masks = Masks() if masks is None else masks.to(x_BSD.dtype)
        x_BSD = masked(x_BSD, masks.residual)
        context = self._context(position_ids, documents, masks, x_BSD.dtype)
        for index, layer in enumerate(self.layers):
            gate = masks.gate(index)
            if self.recompute == "full" and torch.is_grad_enabled():
                x_BSD = checkpoint(layer, x_BSD, context, gate, use_reentrant=True)
            else:
                x_BSD = layer(x_BSD, context, gate)
        return self.norm(x_BSD, context)

    def _context(
        self, positions: Tensor, documents: Any, masks: Masks, dtype: torch.dtype
    ) -> Context:
        cos, sin = rotary_tables(self.config, positions)
        attention_mask = self.ops.attention_mask(documents, positions)
        return Context(
            self.ops, cos.to(dtype), sin.to(dtype), attention_mask, masks, self.recompute
        )


HeadLoss = Callable[[Tensor, Tensor], Tensor]
"""What takes the place of the logits: a function of the hidden states (B, S, D) and of the
head's weight, the rows of the vocabulary (V, D) that this device holds."""


class Head(nn.Linear):
    """Hidden states to logits, or to a loss that is computed while the weight is at hand (under
    ZeRO-3 only within this module)."""

    def forward(self, x_BSD: Tensor, loss: HeadLoss | None = None) -> Tensor:
        return F.linear(x_BSD, self.weight) if loss is None else loss(x_BSD, self.weight)


class LlamaForCausalLM(nn.Module):
    """Token ids to logits, or to a loss.

    forward(input_ids, position_ids, documents, masks, loss): the first two (B, S) int64; documents
    as `ops.pack` gives them, None where attention does not stop at them; masks only where parts of
    the model are being let in. Returns logits (B, S, V), V being the rows of the vocabulary that
    this device holds; where a `loss` is given, what that makes of the hidden states and the head.
    """

    def __init__(self, config: ModelConfig, recompute: str = "none", ops: Ops = PLAIN) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.model = LlamaModel(config, recompute, ops)
        self.pre_collective: nn.Module = nn.Identity()
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.get_parameter("embed_tokens.weight")

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Any = None,
        masks: Masks | None = None,
        loss: HeadLoss | None = None,
    ) -> Tensor:
        x_BSD = self.pre_collective(self.model(input_ids, position_ids, documents, masks))
        return self.lm_head(x_BSD, loss)
