"""RMSNorm, with and without a preceding residual addition, forward and backward.

With x a row of D numbers (the sum of input and residual, if there is a residual) and r = 1 /
sqrt(mean(x^2) + eps), n = x r, the norm is y = n w, and its gradients are

    dx = r (dy w - n mean(dy w n))    and    dw = the sum of dy n over all rows.

The kernels are memory-bound, so every element is read and written once: a row is held entirely in
registers, and x, w and r are saved for the backward pass. The backward pass starts two programs per
multiprocessor for any number of rows. Each program loops over tiles of rows, prefetches the next
tile, and accumulates its share of dw in registers in fp32. Rows that do not fit in registers
together with dw are read a second time, from a cache. A second kernel sums the shares in a fixed
order. Shapes: D width, ... any leading dimensions.
"""

from collections.abc import Mapping
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
from megagrow_kernels.tiles import select

PROGRAMS_EACH = 2
"""Programs per multiprocessor in the backward pass."""


@triton.jit
def _read(pointers, mask, POLICY: tl.constexpr):
    """Load as fp32, with zeros outside the mask. POLICY is the cache eviction policy."""
    return tl.load(pointers, mask, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    residual,
    weight,
    y,
    total,
    inverse_rms,
    rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < WIDTH
    mask = (row < rows)[:, None] & inside
    offsets = row.to(tl.int64)[:, None] * WIDTH + column
    values = _read(x + offsets, mask, "")
    if residual is not None:
        values += _read(residual + offsets, mask, "")
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + offsets, rounded, mask)
        values = rounded.to(tl.float32)
    gain = _read(weight + column, inside, "")
    inverse = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)
    tl.store(inverse_rms + row, inverse, row < rows)
    normed = values * inverse[:, None] * gain
    tl.store(y + offsets, normed.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy,
    dtotal,
    x,
    weight,
    inverse_rms,
    dx,
    partials,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    REREAD: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < WIDTH
    if not REREAD:
        gain = _read(weight + column, inside, "")
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside
        start = row.to(tl.int64)[:, None] * WIDTH
        inverse = tl.load(inverse_rms + row, row < rows, other=0.0)[:, None]
        if REREAD:
            gain = _read(weight + column, inside, "evict_last")
        normed = _read(x + start + column, mask, "") * inverse
        upstream = _read(dy + start + column, mask, "")
        along = tl.sum(upstream * gain * normed, 1)[:, None] / WIDTH
        if REREAD:  # registers hold dw: read the row again, from a cache
            gain = _read(weight + column, inside, "")
            normed = _read(x + start + column, mask, "evict_first") * inverse
            upstream = _read(dy + start + column, mask, "evict_first")
        dw += upstream * normed
        gradient = (upstream * gain - normed * along) * inverse
        if dtotal is not None:
            gradient += _read(dtotal + start + column, mask, "")
        tl.store(dx + start + column, gradient.to(dx.dtype.element_ty), mask)
    tl.store(partials + program * WIDTH + column, tl.sum(dw, 0)[None, :], inside)


@triton.jit(do_not_specialize=["shares"])
def _weight_kernel(
    partials,
    dw,
    shares,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, shares, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < shares)[:, None] & inside[None, :]
        total += tl.load(partials + row[:, None] * WIDTH + column[None, :], mask, other=0.0)
    tl.store(dw + column, tl.sum(total, 0).to(dw.dtype.element_ty), inside)


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the norm (..., D), the sum x + residual or None, and 1 / rms (...) in fp32.

    x and residual are (..., D) of one dtype; weight is (D,) in bf16, fp16 or fp32. Raises
    ValueError for other shapes and dtypes, LookupError for rows wider than the tile tables support.
    """
    _check(x, residual, weight)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, inverse_rms = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if residual is None else torch.empty_like(x)
    width, rows = x.shape[-1], inverse_rms.numel()
    tile, block = _tile("rms_norm", x)
    out, sizes = (y, total, inverse_rms), (rows, eps, width)
    launch(
        _forward_kernel,
        (blocks_of(rows, tile["ROWS"]),),
        *(x, residual, weight.contiguous(), *out, *sizes),
        BLOCK=block,
        **tile,
    )
    return out


def rms_norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, (..., D), and of the weight, (D,).

    x is the input of the norm. dy and dtotal are the gradients of the norm and, with a residual, of
    the sum, both (..., D) in the dtype of x. inverse_rms is (...), from the forward pass.
    """
    for other in (dy, dtotal):
        _check(x, other, weight)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    width, rows = x.shape[-1], inverse_rms.numel()
    tile, block = _tile("rms_norm_backward", x)
    shares = min(PROGRAMS_EACH * programs(x.device), blocks_of(rows, tile["ROWS"]))
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    partials = x.new_empty((shares, width), dtype=torch.float32)
    inputs = (dy, dtotal, x, weight, inverse_rms)
    sizes = (rows, width)
    launch(_backward_kernel, (shares,), *inputs, dx, partials, *sizes, BLOCK=block, **tile)
    tile = select("rms_norm_weight", architecture(x.device), width=width)
    grid = (blocks_of(width, tile["COLUMNS"]),)
    launch(_weight_kernel, grid, partials, dw, shares, width, **tile)
    return dx, dw


def _check(x: Tensor, other: Tensor | None, weight: Tensor) -> None:
    check_floats("rms_norm", x=x, other=other)
    if weight.shape != x.shape[-1:] or (other is not None and other.shape != x.shape):
        shapes = [tuple(t.shape) for t in (x, other, weight) if t is not None]
        raise ValueError(f"rms_norm requires inputs (..., D) and a weight (D,), got {shapes}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"rms_norm requires a bf16, fp16 or fp32 weight, got {weight.dtype}")


def _tile(op: str, x: Tensor) -> tuple[Mapping[str, int], int]:
    """Return the launch configuration and the width rounded to a power of 2, which holds a row."""
    width = x.shape[-1]
    use = select(op, architecture(x.device), width=width, bytes=x.element_size())
    return use, power_of_2(width)


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, inverse_rms = rms_norm_forward(x, None, weight, eps)
    return y, inverse_rms


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, inverse_rms = rms_norm_forward(x, residual, weight, eps)
    assert total is not None
    return y, total, inverse_rms


_op = torch.library.custom_op("megagrow::rms_norm", _norm, mutates_args=())
_add_op = torch.library.custom_op("megagrow::add_rms_norm", _add_norm, mutates_args=())
_backward_op = torch.library.custom_op(
    "megagrow::rms_norm_backward", rms_norm_backward, mutates_args=()
)


@_op.register_fake
def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_add_op.register_fake
def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, inverse_rms = _fake(x, weight, eps)
    return y, x.new_empty(x.shape), inverse_rms


@_backward_op.register_fake
def _backward_fake(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Save the weight itself, not a copy or a view: ZeRO-3 frees its memory after the forward pass
    # and refills it before the backward pass.
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zero gradient for inverse_rms


def _gradients(backward: Any, ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
    return *backward(dy, None, *ctx.saved_tensors), None


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, inverse_rms = output[1:]
    ctx.save_for_backward(total, inputs[2], inverse_rms)
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)  # nor for an unused sum


def _add_gradients(
    backward: Any, ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dw = backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, dw, None


_rms_norm = differentiable(_op, _backward_op, (_norm, rms_norm_backward), _save, _gradients)
_add_rms_norm = differentiable(
    _add_op, _backward_op, (_add_norm, rms_norm_backward), _add_save, _add_gradients
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    x is (..., D) in bf16, fp16 or fp32, as is the result; weight is (D,) in any of these dtypes.
    Raises ValueError for other dtypes and shapes, LookupError for rows wider than the tile tables
    support.
    """
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and that sum, which is rounded to its dtype before the norm.

    x and residual are (..., D) of one dtype, bf16, fp16 or fp32, as are both results; weight is
    (D,). The backward kernel also adds the gradient of the sum. Raises the errors of `rms_norm`.
    """
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total
