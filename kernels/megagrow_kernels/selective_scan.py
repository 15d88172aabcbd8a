"""Selective scan of Mamba (Gu and Dao 2023), forward and backward.

With delta = softplus(dt + dt_bias) and a = exp(delta A), the state h_t = a_t h_(t-1) + delta_t B_t
x_t gives y_t = <C_t, h_t> + D x_t. With g_t = dy_t C_t + a_(t+1) g_(t+1), the gradient of h_t, and
r_t = a_t h_(t-1), the gradients are

    dx = delta <g, B> + D dy,    ddelta = <g, A r> + x <g, B>,    dA = sum over tokens of g delta r,
    dB = sum over channels of g delta x,    dC = sum over channels of dy h.

Both passes run over chunks of a row in parallel: a first kernel scans every chunk from 0, a second
carries the states from chunk to chunk, a third scans every chunk from the state that enters it. The
forward pass saves only these states. Sums over channels, tokens and rows are written as partial
sums and added in a fixed order. Shapes: B batch, S sequence, C channels, N state size, K chunks.
"""

from typing import Any

import torch
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
from megagrow_kernels.selective_scan_kernels import (
    _carry_kernel,
    _gradient_kernel,
    _output_kernel,
    _summary_kernel,
)
from megagrow_kernels.tiles import select

CHUNK = 64
"""Tokens per chunk: the saved states need N / 16 bytes per element of x."""

PROGRAMS_EACH = 8
"""Programs of the gradient kernel per multiprocessor; each has its own scratch memory."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def selective_scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return y (B, S, C), and the states that enter the chunks, (B, K, N, C) in fp32."""
    _check(x, dt, A, B, C, D, dt_bias, starts)
    inputs = tuple(tensor.contiguous() for tensor in (x, dt, A, B, C, D, dt_bias, starts))
    x, dt, A, B, _, _, dt_bias, starts = inputs
    entering = _entering(x, dt, A, B, dt_bias, starts, reverse=False)
    y, chunks, use = torch.empty_like(x), entering.shape[1], _tile("selective_scan", A)
    grid = (blocks_of(x.shape[2], use["CHANNELS"]), chunks, x.shape[0])
    launch(_output_kernel, grid, *inputs, entering, y, x.shape[1], chunks, **use)
    return y, entering


def selective_scan_backward(
    dy: Tensor,
    entering: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
) -> Gradients:
    """Return the gradients of x, dt, A, B, C, D and dt_bias; entering is from the forward pass."""
    check_floats("selective_scan", dy=dy, x=x)
    inputs = tuple(tensor.contiguous() for tensor in (dy, x, dt, A, B, C, D, dt_bias, starts))
    dy, x, dt, A, B, C, D, dt_bias, starts = inputs
    upstream = _entering(dy, dt, A, C, dt_bias, starts, reverse=True)
    (batch, length, width), chunks = x.shape, entering.shape[1]
    use = _tile("selective_scan_backward", A)
    blocks = blocks_of(width, use["CHANNELS"])
    groups = min(blocks_of(PROGRAMS_EACH * programs(x.device), blocks * batch), chunks)
    grid, shares = (blocks, groups, batch), groups * batch

    def partial(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    state = use["NUMBERS"] * use["CHANNELS"]
    scratch = partial(blocks * shares, CHUNK // use["STEPS"], state)
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    sums = (
        *(partial(shares, *A.shape), partial(blocks, *B.shape), partial(blocks, *C.shape)),
        *(partial(shares, width), partial(shares, width)),
    )
    tensors = (*inputs, entering, upstream, scratch, dx, ddt, *sums)
    launch(_gradient_kernel, grid, *tensors, length, chunks, **use)
    dA, dB, dC, dD, dbias = (
        parts.sum(0).to(like.dtype) for parts, like in zip(sums, (A, B, C, D, dt_bias), strict=True)
    )
    return dx, ddt, dA, dB, dC, dD, dbias


def _entering(
    source: Tensor,
    dt: Tensor,
    A: Tensor,
    weights: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
    reverse: bool,
) -> Tensor:
    """Return the states before each chunk, (B, K, N, C); in reverse, the gradients after each."""
    batch, length, width = source.shape
    chunks, use = blocks_of(length, CHUNK), _tile("selective_scan", A)
    shape = (batch, chunks, A.shape[1], width)
    local, product = (source.new_empty(shape, dtype=torch.float32) for _ in range(2))
    grid = (blocks_of(width, use["CHANNELS"]), chunks, batch)
    inputs = (source, dt, A, weights, dt_bias, starts)
    launch(_summary_kernel, grid, *inputs, local, product, length, chunks, reverse, **use)
    use = select("selective_scan_carry", architecture(source.device))
    grid = (blocks_of(A.numel(), use["BLOCK"]), batch)
    launch(_carry_kernel, grid, local, product, chunks, reverse, A.numel(), **use)
    return local


def _tile(op: str, A: Tensor) -> dict[str, int]:
    """Return the launch configuration of a kernel of states, with the sizes of A (C, N)."""
    width, states = A.shape
    use = select(op, architecture(A.device), states=states)
    sizes = {"WIDTH": width, "STATES": states, "NUMBERS": power_of_2(states), "CHUNK": CHUNK}
    return {**use, **sizes}


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
) -> None:
    check_floats("selective_scan", x=x, dt=dt, B=B, C=C)
    if any(t.dtype not in FLOATS for t in (A, D, dt_bias)) or starts.dtype != torch.bool:
        raise ValueError(
            "selective_scan requires bf16, fp16 or fp32 A, D and dt_bias and bool starts, got "
            f"{A.dtype}, {D.dtype}, {dt_bias.dtype}, {starts.dtype}"
        )
    (batch, length, width), states = x.shape, A.shape[-1]
    required = {
        "dt": (dt, (batch, length, width)),
        "A": (A, (width, states)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
        "D": (D, (width,)),
        "dt_bias": (dt_bias, (width,)),
        "starts": (starts, (batch, length)),
    }
    for name, (tensor, shape) in required.items():
        if tensor.shape != shape:
            raise ValueError(f"selective_scan requires {name} {shape}, got {tuple(tensor.shape)}")


_op = torch.library.custom_op("megagrow::selective_scan", selective_scan_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "megagrow::selective_scan_backward", selective_scan_backward, mutates_args=()
)


@_op.register_fake
def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    shape = (batch, blocks_of(length, CHUNK), A.shape[1], width)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


@_backward_op.register_fake
def _backward_fake(
    dy: Tensor,
    entering: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
) -> Gradients:
    dx, ddt, dA, dB, dC, dD, dbias = (t.new_empty(t.shape) for t in (x, dt, A, B, C, D, dt_bias))
    return dx, ddt, dA, dB, dC, dD, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zero gradient for the states


def _gradients(backward: Any, ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *backward(dy, *ctx.saved_tensors), None


_scan = differentiable(
    _op, _backward_op, (selective_scan_forward, selective_scan_backward), _save, _gradients
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Return the selective state space model of Mamba; `reference.selective_scan` defines it.

    x and dt are (B, S, C), B and C are (B, S, N), all of one dtype, bf16, fp16 or fp32. A (C, N) is
    negative; D and dt_bias are (C,); each in any of these dtypes. starts (B, S), bool, is True at
    the first token of a document. The result has the dtype of x; the computation is in fp32. Raises
    ValueError for other dtypes, shapes and devices, LookupError for states larger than the tile
    tables support.
    """
    starts = no_starts(x) if starts is None else starts
    return _scan(x, dt, A, B, C, D, dt_bias, starts)[0]
