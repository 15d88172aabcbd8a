"""RMSNorm, alone and with the residual addition before it, forward and backward.

With x a row of D numbers (the sum of input and residual, where there is one) and
r = 1 / sqrt(mean(x^2) + eps), n = x r, the norm is y = n w, and its gradients are

    dx = r (dy w - n mean(dy w n))    and    dw = the sum of dy n over all rows.

All of it is bound by memory, so every number is read and written once: a row is held in registers
as a whole, and x, w and r are saved for the backward pass. That one starts two programs per
multiprocessor, whatever the number of rows; each goes through many tiles of rows, loading the next
ones while it computes, and keeps its share of dw in registers, fp32; rows too wide to be held
beside it are read once more, while they are in a cache. A second kernel adds up the shares, always
in the same order. Shapes: D width, ... any leading dimensions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.inputs import FLOATS, check_floats
from megagrow_kernels.launching import architecture, launch, programs
from megagrow_kernels.tiles import select

PROGRAMS_EACH = 2
"""Programs of the backward pass per multiprocessor."""


@triton.jit
def _read(pointers, mask, POLICY: tl.constexpr):
    """Numbers as fp32, zeros where the mask has none; POLICY says how to treat caches."""
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
        if REREAD:  # registers are for dw: the row is read once more, from a cache
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
    """The norm (..., D), the sum x + residual if there is a residual, 1 / rms (...) in fp32.

    x and residual are (..., D) of one type, weight is (D,) of any that kernels compute in. Raises
    ValueError for other shapes and types, LookupError for rows too wide.
    """
    _check(x, residual, weight)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, inverse_rms = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if residual is None else x.new_empty(x.shape)
    width, rows = x.shape[-1], inverse_rms.numel()
    tile = _tile("rms_norm", x)
    grid = (triton.cdiv(rows, tile["ROWS"]),)
    out = (y, total, inverse_rms)
    launch(_forward_kernel, grid, x, residual, weight.contiguous(), *out, rows, eps, width, **tile)
    return out


def rms_norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of what was normed, (..., D) as x, and of the weight, (D,).

    dy and dtotal, what flows back into the norm and (where there was a residual) into the sum, are
    (..., D) of the type of x, which is what was normed; inverse_rms is (...) from the forward pass.
    """
    for other in (dy, dtotal):
        _check(x, other, weight)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    width, rows = x.shape[-1], inverse_rms.numel()
    tile = _tile("rms_norm_backward", x)
    shares = min(PROGRAMS_EACH * programs(x.device), triton.cdiv(rows, tile["ROWS"]))
    dx, dw = x.new_empty(x.shape), weight.new_empty(width)
    partials = x.new_empty((shares, width), dtype=torch.float32)
    given = (dy, dtotal, x, weight, inverse_rms)
    launch(_backward_kernel, (shares,), *given, dx, partials, rows, width, **tile)
    tile = select("rms_norm_weight", architecture(x.device), width=width)
    grid = (triton.cdiv(width, tile["COLUMNS"]),)
    launch(_weight_kernel, grid, partials, dw, shares, width, **tile)
    return dx, dw


def _check(x: Tensor, other: Tensor | None, weight: Tensor) -> None:
    check_floats("rms_norm", x=x, other=other)
    shapes = [tuple(t.shape) for t in (x, other, weight) if t is not None]
    if shapes[-1] != shapes[0][-1:] or shapes[-2] != shapes[0]:
        raise ValueError(f"rms_norm takes inputs (..., D) and a weight (D,), not {shapes}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"rms_norm takes a weight in bf16, fp16 or fp32, not {weight.dtype}")


def _tile(op: str, x: Tensor) -> dict[str, int]:
    """A whole row fits into a tile: its width is the next power of two."""
    width = x.shape[-1]
    use = select(op, architecture(x.device), width=width, bytes=x.element_size())
    return use | {"BLOCK": triton.next_power_of_2(width)}


@torch.library.custom_op("megagrow::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, inverse_rms = rms_norm_forward(x, None, weight, eps)
    return y, inverse_rms


@torch.library.custom_op("megagrow::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, inverse_rms = rms_norm_forward(x, residual, weight, eps)
    assert total is not None
    return y, total, inverse_rms


_rms_norm_backward = torch.library.custom_op(
    "megagrow::rms_norm_backward", rms_norm_backward, mutates_args=()
)


@_rms_norm.register_fake
def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_add_rms_norm.register_fake
def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, inverse_rms = _fake(x, weight, eps)
    return y, x.new_empty(x.shape), inverse_rms


@_rms_norm_backward.register_fake
def _backward_fake(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The weight itself is saved, no copy and no view of it: ZeRO-3 lets its memory go after the
    # forward pass and fills it again before the backward pass.
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(dy, None, *ctx.saved_tensors), None


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, inverse_rms = output[1:]
    ctx.save_for_backward(total, inputs[2], inverse_rms)
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)  # no zeros are added for a sum that nobody uses


def _add_gradients(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dw = _rms_norm_backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, dw, None


_rms_norm.register_autograd(_gradients, setup_context=_save)
_add_rms_norm.register_autograd(_add_gradients, setup_context=_add_save)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    x is (..., D) in bf16, fp16 or fp32, as is the result; weight is (D,) in any of these. Raises
    ValueError for other types and shapes, LookupError for rows wider than the tiles know.
    """
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum, rounded to its type before it is normed.

    x and residual are (..., D) of one type, bf16, fp16 or fp32, as are both results; weight is
    (D,). What flows back into the sum is added by the same kernel. Raises as `rms_norm` does.
    """
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total
