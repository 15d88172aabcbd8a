"""Representative calls of every op, for compilation and timing.

Each function creates the inputs of one op on a device from sizes and dtypes, and returns the launch
functions by name of the tile table they read. On the meta device a launch only compiles; on a GPU
the inputs are random.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megagrow_kernels import cross_entropy as ce
from megagrow_kernels import rms_norm as norm
from megagrow_kernels import rope as rotary
from megagrow_kernels import swiglu as gated
from megagrow_kernels.attention_backward import attention_backward
from megagrow_kernels.attention_forward import attention_forward
from megagrow_kernels.causal_conv import causal_conv_backward, causal_conv_forward
from megagrow_kernels.packing import no_starts, pack
from megagrow_kernels.selective_scan import selective_scan_backward, selective_scan_forward

Launches = dict[str, Callable[[], object]]

EPS = 1e-5


def launches(op: str, device: torch.device, arguments: Mapping[str, Any]) -> Launches:
    """Return functions that launch the kernels of an op, forward and backward, by tile table.

    `arguments` are the keyword arguments of the op's function in this module; dtypes are given by
    name, such as "bfloat16". Raises KeyError for an unknown op.
    """
    return _OPS[op](device, **arguments)


def _rms_norm(
    device: torch.device, rows: int, width: int, dtype: str, parameter_dtype: str | None = None
) -> Launches:
    return _norm(device, rows, width, dtype, parameter_dtype or dtype, residual=False)


def _add_rms_norm(device: torch.device, rows: int, width: int, dtype: str) -> Launches:
    return _norm(device, rows, width, dtype, dtype, residual=True)


def _norm(
    device: torch.device, rows: int, width: int, dtype: str, parameter_dtype: str, residual: bool
) -> Launches:
    x, dy = (draw(device, dtype, rows, width) for _ in range(2))
    other = draw(device, dtype, rows, width) if residual else None
    weight = draw(device, parameter_dtype, width)
    _, total, inverse_rms = norm.rms_norm_forward(x, other, weight, EPS)
    normed = x if total is None else total

    def backward() -> object:
        return norm.rms_norm_backward(dy, other, normed, weight, inverse_rms)

    return {
        "rms_norm": lambda: norm.rms_norm_forward(x, other, weight, EPS),
        "rms_norm_backward": backward,
        "rms_norm_weight": backward,
    }


def _rope(
    device: torch.device,
    batch: int,
    sequence: int,
    heads: int,
    groups: int,
    head_dim: int,
    dtype: str,
    table_dtype: str,
) -> Launches:
    q = draw(device, dtype, batch, sequence, heads, head_dim)
    k = draw(device, dtype, batch, sequence, groups, head_dim)
    cos, sin = (draw(device, table_dtype, batch, sequence, 1, head_dim) for _ in range(2))

    def forward_backward() -> object:
        return rotary.rope_forward(q, k, cos, sin), rotary.rope_backward(q, k, cos, sin)

    return {"rope": forward_backward}


def _swiglu(device: torch.device, rows: int, width: int, dtype: str) -> Launches:
    gate, up, dout = (draw(device, dtype, rows, width) for _ in range(3))

    def forward_backward() -> object:
        return gated.swiglu_forward(gate, up), gated.swiglu_backward(dout, gate, up)

    return {"swiglu": forward_backward}


def _attention(
    device: torch.device,
    batch: int,
    sequence: int,
    heads: int,
    groups: int,
    head_dim: int,
    dtype: str,
    window: int | None = None,
    queries: int | None = None,
) -> Launches:
    q = draw(device, dtype, batch, queries or sequence, heads, head_dim)
    k, v = (draw(device, dtype, batch, sequence, groups, head_dim) for _ in range(2))
    packing = pack(None, batch, sequence, queries).to(device)
    scale = head_dim**-0.5

    def forward() -> tuple[Tensor, Tensor]:
        return attention_forward(q, k, v, packing.query_tiles, scale, window)

    out, logsumexp = forward()
    tiles = (packing.query_tiles, packing.key_tiles)

    def backward() -> object:
        return attention_backward(q, q, k, v, out, logsumexp, *tiles, scale, window)

    return {
        "attention_forward": forward,
        "attention_queries": backward,
        "attention_keys": backward,
    }


def _cross_entropy(
    device: torch.device, rows: int, width: int, real: int, ranks: int, dtype: str
) -> Launches:
    logits = draw(device, dtype, rows, width)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    maximum, total, scale, z_scale = (torch.ones(rows, device=device) for _ in range(4))
    triples = torch.ones(max(ranks, 2), 3, rows, device=device)
    values = (maximum, total, scale, z_scale)
    return {
        "vocab_statistics": lambda: ce.vocab_statistics_forward(logits, labels, 0, real),
        "combine_statistics": lambda: ce.combine_statistics_forward(triples),
        "vocab_gradient": lambda: ce.vocab_gradient_backward(logits, labels, *values, 0, real),
    }


def _causal_conv(
    device: torch.device,
    batch: int,
    sequence: int,
    channels: int,
    taps: int,
    dtype: str,
    parameter_dtype: str,
) -> Launches:
    x, dy = (draw(device, dtype, batch, sequence, channels) for _ in range(2))
    weight = draw(device, parameter_dtype, channels, taps)
    bias = draw(device, parameter_dtype, channels)
    inputs = (x, weight, bias, no_starts(x))
    return {
        "causal_conv": lambda: causal_conv_forward(*inputs),
        "causal_conv_backward": lambda: causal_conv_backward(dy, *inputs),
    }


def _selective_scan(
    device: torch.device,
    batch: int,
    sequence: int,
    channels: int,
    states: int,
    dtype: str,
    parameter_dtype: str,
) -> Launches:
    x, dt, dy = (draw(device, dtype, batch, sequence, channels) for _ in range(3))
    B, C = (draw(device, dtype, batch, sequence, states) for _ in range(2))
    A = -draw(device, "float32", channels, states).exp()
    D, dt_bias = (draw(device, parameter_dtype, channels) for _ in range(2))
    inputs = (x, dt, A, B, C, D, dt_bias, no_starts(x))

    def forward() -> tuple[Tensor, Tensor]:
        return selective_scan_forward(*inputs)

    _, entering = forward()

    def backward() -> object:
        return selective_scan_backward(dy, entering, *inputs)

    return {
        "selective_scan": forward,
        "selective_scan_carry": forward,
        "selective_scan_backward": backward,
    }


def draw(device: torch.device, dtype: str, *shape: int) -> Tensor:
    """Return normally distributed numbers; an uninitialized tensor on the meta device."""
    torch_dtype = getattr(torch, dtype)
    if device.type == "meta":
        return torch.empty(shape, dtype=torch_dtype, device=device)
    return torch.randn(shape, dtype=torch.float32, device=device).to(torch_dtype)


_OPS: dict[str, Callable[..., Launches]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "causal_conv": _causal_conv,
    "selective_scan": _selective_scan,
}
