"""Causal attention within packed documents, with grouped key/value heads, as a PyTorch op.

`megagrow::attention` and `megagrow::attention_backward` are opaque to torch.compile. They are named
ops, so a selective activation checkpointing policy can keep their outputs (`dispatch.py`).
"""

import torch
from torch import Tensor

from megagrow_kernels.attention_backward import attention_backward
from megagrow_kernels.attention_forward import attention_forward
from megagrow_kernels.dispatch import differentiable
from megagrow_kernels.launching import FLOATS
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
    """Return softmax(scale q k^T) v over the tokens visible to each query; (B, Sq, H, D) as q.

    q is (B, Sq, H, D), k and v are (B, Sk, G, D) with H a multiple of G and D a multiple of 8 up to
    256, all bf16, fp16 or fp32. The queries are those of the last Sq <= Sk tokens of each row, as
    in flash-attn; with Sq < Sk, the packing is `pack(document_ids, B, Sk, queries=Sq)`. A token
    attends to itself and to earlier tokens of its document, as defined by the packing of this
    batch; with a window of w tokens, to itself and the w - 1 tokens before it. scale defaults to
    1 / sqrt(D). Raises ValueError for other shapes and for scale <= 0 or window < 1, TypeError for
    other dtypes.
    """
    _check(q, k, v, scale, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _attention(q, k, v, packing.query_tiles, packing.key_tiles, scale, window)
    return out


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    return attention_forward(q, k, v, query_tiles, scale, window)


_op = torch.library.custom_op("megagrow::attention", _forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "megagrow::attention_backward", attention_backward, mutates_args=()
)


@_op.register_fake
def _fake(q, k, v, query_tiles, key_tiles, scale, window):
    tokens = q.shape[0] * q.shape[1]
    return q.new_empty(q.shape), q.new_empty((q.shape[2], tokens), dtype=torch.float32)


@_backward_op.register_fake
def _backward_fake(grad, q, k, v, out, logsumexp, query_tiles, key_tiles, scale, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, query_tiles, key_tiles, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zero gradient for logsumexp
    ctx.save_for_backward(q, k, v, *output, query_tiles, key_tiles)


def _gradients(backward, ctx, grad, _):
    gradients = backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *gradients, None, None, None, None


_attention = differentiable(_op, _backward_op, (_forward, attention_backward), _save, _gradients)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> None:
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"attention requires one of bf16, fp16, fp32, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    batch, queries, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    expected = (batch, keys, groups, head_dim)
    if k.shape != v.shape or k.shape != expected or queries > keys or heads % groups:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            "attention requires q (B, Sq, H, D), k and v (B, Sk, G, D) with Sq <= Sk and H a "
            f"multiple of G, got {shapes}"
        )
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        raise ValueError(f"head dimension {head_dim} is not a multiple of 8 up to 256")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale {scale} is not positive")
    if window is not None and window < 1:
        raise ValueError(f"window {window} is less than 1")
