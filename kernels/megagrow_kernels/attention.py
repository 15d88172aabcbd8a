"""Attention as an op of torch: causal, within packed documents, with shared key/value heads.

`megagrow::attention` and `megagrow::attention_backward` are opaque to torch.compile and named, so
that activation checkpointing can be told to keep what they return.
"""

import torch
from torch import Tensor

from megagrow_kernels.attention_backward import attention_backward
from megagrow_kernels.attention_forward import attention_forward
from megagrow_kernels.inputs import FLOATS
from megagrow_kernels.packing import Packing

LARGEST_HEAD = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over what each token may see; (B, S, H, D) as q.

    q is (B, S, H, D), k and v are (B, S, G, D) with H a multiple of G and D a multiple of 8 up to
    256, all bf16, fp16 or fp32. A token sees itself and what comes before it in its document, by
    the packing of this batch; with a window of w tokens only itself and the w - 1 before. scale is
    1 / sqrt(D) if not given. Raises ValueError for other shapes and numbers, TypeError for types.
    """
    _check(q, k, v, scale, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _attention(q, k, v, packing.query_tiles, packing.key_tiles, scale, window)
    return out


@torch.library.custom_op("megagrow::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    return attention_forward(q, k, v, query_tiles, scale, window)


@_attention.register_fake
def _(q, k, v, query_tiles, key_tiles, scale, window):
    tokens = q.shape[0] * q.shape[1]
    return q.new_empty(q.shape), q.new_empty((q.shape[2], tokens), dtype=torch.float32)


_attention_backward = torch.library.custom_op(
    "megagrow::attention_backward", attention_backward, mutates_args=()
)


@_attention_backward.register_fake
def _(grad, q, k, v, out, logsumexp, query_tiles, key_tiles, scale, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    q, k, v, query_tiles, key_tiles, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, query_tiles, key_tiles)


def _differentiate(ctx, grad, _):
    saved = ctx.saved_tensors
    gradients = _attention_backward(grad, *saved, ctx.scale, ctx.window)
    return *gradients, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> None:
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"attention takes bf16, fp16 or fp32, not {q.dtype}, {k.dtype}, {v.dtype}")
    batch, sequence, heads, head_dim = q.shape
    groups = k.shape[2]
    if k.shape != v.shape or k.shape != (batch, sequence, groups, head_dim) or heads % groups:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention of shapes that do not fit: {shapes}")
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        raise ValueError(f"head dimension {head_dim}: attention takes multiples of 8 up to 256")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale {scale} has to be positive")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a token sees at least itself")
