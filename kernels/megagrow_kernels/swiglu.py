"""SwiGLU, silu(gate) * up (Shazeer 2020), forward and backward; only the inputs are saved.

With s = 1 / (1 + exp(-gate)), so that silu(gate) = gate s, the gradients are

    dup = dout gate s    and    dgate = dout up s (1 + gate (1 - s)).

Every element is read and written once. Shapes: F feed-forward width, ... any leading dimensions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.dispatch import differentiable
from megagrow_kernels.launching import architecture, blocks_of, check_floats, launch
from megagrow_kernels.tiles import select

# Triton recompiles a kernel for a `count` that is not divisible by 16, since 16-byte loads depend
# on it. Model widths are multiples of 16, so the number of tokens does not matter.


@triton.jit
def _forward_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    g = tl.load(gate + offsets, mask, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(dout, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    d = tl.load(dout + offsets, mask, other=0.0).to(tl.float32)
    g = tl.load(gate + offsets, mask, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + offsets, (d * g * s).to(dup.dtype.element_ty), mask)
    slope = s * (1.0 + g * (1.0 - s))
    tl.store(dgate + offsets, (d * u * slope).to(dgate.dtype.element_ty), mask)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; see `swiglu`."""
    _check(gate=gate, up=up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _launch(_forward_kernel, gate, up, out)
    return out


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, given that of the output, all (..., F) of one dtype."""
    _check(dout=dout, gate=gate, up=up)
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _launch(_backward_kernel, dout, gate, up, dgate, dup)
    return dgate, dup


def _check(**tensors: Tensor) -> None:
    check_floats("swiglu", **tensors)
    first, *others = tensors.values()
    if any(x.shape != first.shape for x in others):
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        raise ValueError(f"swiglu requires tensors of one shape, got {shapes}")


def _launch(kernel: Any, *tensors: Tensor) -> None:
    first = tensors[0]
    tile = select("swiglu", architecture(first.device), bytes=first.element_size())
    count = first.numel()
    launch(kernel, (blocks_of(count, tile["BLOCK"]),), *tensors, count, **tile)


_op = torch.library.custom_op("megagrow::swiglu", swiglu_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "megagrow::swiglu_backward", swiglu_backward, mutates_args=()
)


@_op.register_fake
def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward_op.register_fake
def _backward_fake(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(backward: Any, ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return backward(dout, *ctx.saved_tensors)


_swiglu = differentiable(_op, _backward_op, (swiglu_forward, swiglu_backward), _save, _gradients)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020), all (..., F) of one dtype.

    The dtype is bf16, fp16 or fp32; the computation is in fp32. Raises ValueError for other dtypes,
    different shapes or different devices.
    """
    return _swiglu(gate, up)
