"""Causal convolution of each channel with bias and SiLU, as in Mamba, forward and backward.

With z_t = bias + sum over i of w_i x_(t-i) and s = 1 / (1 + exp(-z)), the output is z s. With dz =
dy s (1 + z (1 - s)), the gradients are

    dx_t = sum over i of w_i dz_(t+i),    dw_i = sum of dz_t x_(t-i),    dbias = sum of dz_t.

The index i is the distance of a tap; the reference stores w_i in column W - 1 - i. Taps end at the
first token of a document. The backward pass recomputes z from x, which stays in the L1 cache. Each
of its programs sums dw and dbias over its tokens; the partial sums are added in a fixed order.
Shapes: B batch, S sequence, C channels, W taps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.dispatch import differentiable
from megagrow_kernels.launching import (
    FLOATS,
    architecture,
    blocks_of,
    check_floats,
    launch,
    power_of_2,
    programs,
)
from megagrow_kernels.packing import no_starts
from megagrow_kernels.tiles import select

PROGRAMS_EACH = 8
"""Programs per multiprocessor in the backward pass."""


@triton.jit
def _read(pointers, mask):
    return tl.load(pointers, mask, other=0.0).to(tl.float32)


@triton.jit
def _one_further(reached, starts, token, distance):
    """Restrict a mask of tokens to those in the document of the token `distance` before them.

    The mask already holds for distance - 1. starts points to the first token of the row.
    """
    reached &= token >= distance
    return reached & (tl.load(starts + token - distance + 1, reached, other=1) == 0)


@triton.jit
def _before_silu(
    x, weight, bias, starts, token, channel, exists, stride, WIDTH: tl.constexpr, TAPS: tl.constexpr
):
    """Return z of tokens (TOKENS, 1) and channels (1, CHANNELS); x is the row of the sequence."""
    inside = channel < WIDTH
    total = _read(bias + channel, inside)
    reached = exists
    for distance in tl.static_range(TAPS):
        if distance > 0:
            reached = _one_further(reached, starts, token, distance)
        tap = _read(x + (token - distance) * stride + channel, reached & inside)
        total += tap * _read(weight + channel * TAPS + TAPS - 1 - distance, inside)
    return total


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    x,
    weight,
    bias,
    starts,
    out,
    length,
    stride_b,
    stride_s,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    batch = tl.program_id(2).to(tl.int64)
    row, exists = batch * length, token < length
    source = x + batch * stride_b
    place = (starts + row, token, channel, exists, stride_s)
    total = _before_silu(source, weight, bias, *place, WIDTH, TAPS)
    activated = (total * tl.sigmoid(total)).to(out.dtype.element_ty)
    tl.store(out + (row + token) * WIDTH + channel, activated, exists & (channel < WIDTH))


@triton.jit(do_not_specialize=["length", "tiles"])
def _backward_kernel(
    dy,
    x,
    weight,
    bias,
    starts,
    dx,
    dweight,
    dbias,
    length,
    tiles,
    stride_b,
    stride_s,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside, column = channel < WIDTH, tl.arange(0, PADDED)[:, None]
    sums, sum_bias = tl.zeros((PADDED, CHANNELS), tl.float32), tl.zeros((1, CHANNELS), tl.float32)
    blocks = tl.cdiv(length, TOKENS)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        batch = (tile // blocks).to(tl.int64)
        token = (tile % blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        source, row = x + batch * stride_b, batch * length
        gradient, reached = tl.zeros((TOKENS, CHANNELS), tl.float32), token < length
        for ahead in tl.static_range(TAPS):
            later = token + ahead
            exists = later < length
            if ahead > 0:
                reached &= tl.load(starts + row + later, exists, other=1) == 0
            place = (starts + row, later, channel, exists, stride_s)
            total = _before_silu(source, weight, bias, *place, WIDTH, TAPS)
            gate = tl.sigmoid(total)
            slope = _read(dy + (row + later) * WIDTH + channel, exists & inside)
            slope *= gate * (1.0 + total * (1.0 - gate))
            tap = _read(weight + channel * TAPS + TAPS - 1 - ahead, inside)
            gradient += tl.where(reached, slope, 0.0) * tap
            if ahead == 0:
                seen = exists
                sum_bias += tl.sum(slope, 0, keep_dims=True)
                for distance in tl.static_range(TAPS):
                    if distance > 0:
                        seen = _one_further(seen, starts + row, token, distance)
                    tap = _read(source + (token - distance) * stride_s + channel, seen & inside)
                    share = tl.sum(slope * tap, 0, keep_dims=True)
                    sums += tl.where(column == TAPS - 1 - distance, share, 0.0)
        at = (row + token) * WIDTH + channel
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), (token < length) & inside)
    at = tl.program_id(1) * WIDTH + channel
    tl.store(dweight + at * TAPS + column, sums, (column < TAPS) & inside)
    tl.store(dbias + at, sum_bias, inside)


def causal_conv_forward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor) -> Tensor:
    """Return silu(conv(x) + bias), (B, S, C); see `causal_conv`."""
    _check(x, weight, bias, starts)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, length, width), taps = x.shape, weight.shape[1]
    tile = select("causal_conv", architecture(x.device))
    out = x.new_empty(x.shape)
    grid = (blocks_of(length, tile["TOKENS"]), blocks_of(width, tile["CHANNELS"]), batch)
    inputs = (x, weight.contiguous(), bias.contiguous(), starts.contiguous())
    sizes = (length, *x.stride()[:2], width, taps)
    launch(_forward_kernel, grid, *inputs, out, *sizes, **tile)
    return out


def causal_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (B, S, C), weight (C, W) and bias (C,)."""
    check_floats("causal_conv", dy=dy, x=x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, length, width), taps = x.shape, weight.shape[1]
    tile = select("causal_conv_backward", architecture(x.device))
    blocks, tiles = blocks_of(width, tile["CHANNELS"]), batch * blocks_of(length, tile["TOKENS"])
    shares = min(blocks_of(PROGRAMS_EACH * programs(x.device), blocks), tiles)
    dx = x.new_empty(x.shape)
    dweight = x.new_empty((shares, width, taps), dtype=torch.float32)
    dbias = x.new_empty((shares, width), dtype=torch.float32)
    inputs = (dy.contiguous(), x, weight.contiguous(), bias.contiguous(), starts.contiguous())
    sizes = (length, tiles, *x.stride()[:2], width, taps, power_of_2(taps))
    launch(_backward_kernel, (blocks, shares), *inputs, dx, dweight, dbias, *sizes, **tile)
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor) -> None:
    check_floats("causal_conv", x=x)
    if weight.dtype not in FLOATS or bias.dtype not in FLOATS or starts.dtype != torch.bool:
        raise ValueError(
            "causal_conv requires bf16, fp16 or fp32 weight and bias and bool starts, got "
            f"{weight.dtype}, {bias.dtype}, {starts.dtype}"
        )
    batch, length, width = x.shape
    shapes = [tuple(t.shape) for t in (x, weight, bias, starts)]
    if shapes[1:] != [(width, weight.shape[-1]), (width,), (batch, length)]:
        raise ValueError(
            "causal_conv requires x (B, S, C), weight (C, W), bias (C,), starts (B, S), got "
            f"{shapes}"
        )


_op = torch.library.custom_op("megagrow::causal_conv", causal_conv_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "megagrow::causal_conv_backward", causal_conv_backward, mutates_args=()
)


@_op.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(backward: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(dy, *ctx.saved_tensors), None


_conv = differentiable(
    _op, _backward_op, (causal_conv_forward, causal_conv_backward), _save, _gradients
)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return silu(conv(x) + bias), a causal convolution of each channel.

    x is (B, S, C) in bf16, fp16 or fp32, and may be a strided view, such as a half of a projection.
    weight is (C, W), whose last tap multiplies the current token, and bias is (C,), in any of these
    dtypes. starts (B, S), bool, is True at the first token of a document: taps do not reach before
    it. The result has the dtype of x; the computation is in fp32. Raises ValueError for other
    dtypes, shapes and devices.
    """
    return _conv(x, weight, bias, no_starts(x) if starts is None else starts)
