"""Independent implementation of a Llama with masks: fp64, no module, no shared code.

The paper's equations (Du et al. 2024, A.5) and MSG's norm, as they stand there. Heads are looped
over, the rotation is a product of complex numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig


@dataclass(frozen=True)
class Coefficients:
    """Strength of the new parts, from 0 to 1."""

    depth: float = 1.0
    ffn: float = 1.0
    residual: float = 1.0
    heads: float = 1.0


def vector(old: int, size: int, c: float) -> Tensor:
    return torch.tensor([1.0] * old + [c] * (size - old), dtype=torch.float64)


def norm(x: Tensor, c: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * c / ((c * x**2).sum(-1, keepdim=True) / c.sum() + eps).sqrt() * gain


def rotated(x: Tensor, theta: float) -> Tensor:
    """x (B, S, K): dimensions i and i + K/2 turn together, by position * theta^(-2i/K)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, heads: Tensor) -> Tensor:
    size, each = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    out = []
    for head in range(config.num_attention_heads):
        group = head // each
        q, k, v = (
            heads[group] * x @ w[name][index * size : (index + 1) * size].T
            for name, index in (("q_proj", head), ("k_proj", group), ("v_proj", group))
        )
        q, k = rotated(q, config.rope_theta), rotated(k, config.rope_theta)
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~seen, -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, dim=-1) @ w["o_proj"].T


def feed_forward(x: Tensor, w: Mapping[str, Tensor], ffn: Tensor) -> Tensor:
    gate, up = x @ w["gate_proj"].T, x @ w["up_proj"].T
    return (gate / (1 + torch.exp(-gate)) * up * ffn) @ w["down_proj"].T


def logits(
    weights: Mapping[str, Tensor],
    source: ModelConfig,
    target: ModelConfig,
    c: Coefficients,
    ids: Tensor,
) -> Tensor:
    """Logits (B, S, V) of the target for ids (B, S)."""
    residual = vector(source.hidden_size, target.hidden_size, c.residual)
    ffn = vector(source.intermediate_size, target.intermediate_size, c.ffn)
    heads = vector(source.num_key_value_heads, target.num_key_value_heads, c.heads)
    eps = target.rms_norm_eps
    x = weights["model.embed_tokens.weight"][ids] * residual
    for layer in range(target.num_hidden_layers):
        start = f"model.layers.{layer}."
        w = {
            name.removeprefix(start).removesuffix(".weight").split(".")[-1]: tensor
            for name, tensor in weights.items()
            if name.startswith(start)
        }
        scale = residual * (1.0 if layer < source.num_hidden_layers else c.depth)
        x = x + scale * attention(norm(x, residual, w["input_layernorm"], eps), w, target, heads)
        x = x + scale * feed_forward(norm(x, residual, w["post_attention_layernorm"], eps), w, ffn)
    x = norm(x, residual, weights["model.norm.weight"], eps)
    return x @ weights["lm_head.weight"].T
