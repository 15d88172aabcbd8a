"""The only door to the kernels: the model calls these for all its fused operations."""

import torch.nn.functional as F
from torch import Tensor

from megagrow_kernels.reference import (
    apply_rope,
    attention_mask,
    rope_tables,
    swiglu,
    vocab_statistics,
)

__all__ = ["apply_rope", "attention", "attention_mask", "rms_norm", "rope_tables", "swiglu"]
__all__ += ["vocab_statistics"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x (..., D), weight (D,)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention: q (B, S, H, D), k and v (B, S, G, D), H a multiple of G.

    `mask` is None for plain causal order, or the (B, 1, S, S) booleans of `attention_mask`.
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return out.transpose(1, 2)
