"""Rotary position embedding of queries and keys in one launch, forward and backward.

Elements i and i + D/2 of a head form a pair, rotated by the angle of pair i at the token's position
(Su et al. 2021, in Hugging Face's half-split order). Positions are passed as tables of cosines and
sines, so packed documents need no special case. The gradient of a rotation is the rotation by the
negative angle: the backward pass runs the same kernel and saves only the tables.

Shapes: B batch, S sequence, H query heads, G key heads, D head dimension.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.dispatch import differentiable
from megagrow_kernels.launching import architecture, blocks_of, check_floats, launch, power_of_2
from megagrow_kernels.tiles import select


@triton.jit
def _turn_heads(
    source,
    target,
    present,
    cos,
    sin,
    stride_h,
    TOTAL: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate all heads of a block of tokens.

    source and target point at the first pair of each token's first head, (tokens, 1, pairs); cos
    and sin have the same shape. Heads are stride_h apart in the source and contiguous in the
    target.
    """
    for start in tl.static_range(0, TOTAL, HEADS):
        head = (start + tl.arange(0, HEADS))[None, :, None]
        mask = present & (head < TOTAL)
        first = tl.load(source + head * stride_h, mask, other=0.0).to(tl.float32)
        second = tl.load(source + head * stride_h + HALF, mask, other=0.0).to(tl.float32)
        out = target + head * (2 * HALF)
        tl.store(out, (first * cos - second * sin).to(target.dtype.element_ty), mask)
        tl.store(out + HALF, (second * cos + first * sin).to(target.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["length"])
def _rope_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    length,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    table_stride_b,
    table_stride_s,
    INVERSE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    pair = tl.arange(0, BLOCK)[None, None, :]
    present = (token < length) & (pair < HALF)
    table = batch * table_stride_b + token * table_stride_s + pair
    cosines = tl.load(cos + table, present, other=0.0).to(tl.float32)
    sines = tl.load(sin + table, present, other=0.0).to(tl.float32)
    if INVERSE:
        sines = -sines
    source = q + batch * q_stride_b + token * q_stride_s + pair
    target = q_out + (batch * length + token) * (Q_HEADS * 2 * HALF) + pair
    _turn_heads(source, target, present, cosines, sines, q_stride_h, Q_HEADS, HALF, HEADS)
    source = k + batch * k_stride_b + token * k_stride_s + pair
    target = k_out + (batch * length + token) * (K_HEADS * 2 * HALF) + pair
    _turn_heads(source, target, present, cosines, sines, k_stride_h, K_HEADS, HALF, HEADS)


def rope_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by the angles of the tables; see `rope`."""
    return _rotate(q, k, cos, sin, inverse=False)


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of q (B, S, H, D) and k (B, S, G, D), given those of the outputs."""
    return _rotate(dq, dk, cos, sin, inverse=True)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin)
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    batch, length, _, width = q.shape
    if cos.shape[0] != batch:  # one row, shared by all rows of the batch: its stride becomes 0
        cos, sin = (table.expand(batch, -1, -1, -1) for table in (cos, sin))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    tile = select("rope", architecture(q.device), head_dim=width)
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    strides = (*q.stride()[:3], *k.stride()[:3], *cos.stride()[:2])
    sizes = (q.shape[2], k.shape[2], width // 2, power_of_2(width // 2))
    grid = (blocks_of(length, tile["TOKENS"]), batch)
    launch(_rope_kernel, grid, q, k, cos, sin, *out, length, *strides, inverse, *sizes, **tile)
    return out


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_floats("rope", q=q, k=k)
    check_floats("rope", cos=cos, sin=sin)
    batch, length, _, width = q.shape
    rows, *table = cos.shape
    same = k.shape[:2] == q.shape[:2] and k.shape[3] == width and cos.shape == sin.shape
    if not same or width % 2 or table != [length, 1, width] or rows not in (1, batch):
        shapes = [tuple(x.shape) for x in (q, k, cos, sin)]
        raise ValueError(
            "rope requires q (B, S, H, D), k (B, S, G, D), tables (B or 1, S, 1, D), D even, "
            f"got {shapes}"
        )


_op = torch.library.custom_op("megagrow::rope", rope_forward, mutates_args=())
_backward_op = torch.library.custom_op("megagrow::rope_backward", rope_backward, mutates_args=())


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradients(
    backward: Any, ctx: Any, dq: Tensor, dk: Tensor
) -> tuple[Tensor, Tensor, None, None]:
    return *backward(dq, dk, *ctx.saved_tensors), None, None


_op.register_fake(_fake)
_backward_op.register_fake(_fake)
_rope = differentiable(_op, _backward_op, (rope_forward, rope_backward), _save, _gradients)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (B, S, H, D) and keys (B, S, G, D) by the angles of their positions.

    cos and sin are the tables of `reference.rope_tables`, (B, S, 1, D) or (1, S, 1, D) with equal
    halves, in bf16, fp16 or fp32; they get no gradient. q and k share one of these dtypes and may
    be strided views. The results have the dtype of the inputs; the computation is in fp32. Raises
    ValueError for other shapes, dtypes and devices.
    """
    return _rope(q, k, cos, sin)
