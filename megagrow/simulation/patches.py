"""Replaced functions of torch, DeepSpeed and megagrow, in force during a simulation only.

Each has its reason. The module is the only one of the package that replaces anything.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import bias
from torch.utils._python_dispatch import _disable_current_modes

from megagrow.model.layers.mamba import MAMBA_SSM_CHUNK
from megagrow.parallel.deepspeed_import import deepspeed
from megagrow.simulation import autocast
from megagrow.simulation.device import NAME, SimulatedAccelerator, is_simulated
from megagrow.simulation.recorder import Recorder, is_pinned, mark_pinned


@contextmanager
def patched(recorder: Recorder) -> Iterator[None]:
    """Context in which the training code runs on the simulated device."""
    with ExitStack() as stack:
        for target, name, replacement in _replacements(recorder):
            stack.enter_context(patch.object(target, name, replacement))
        stack.enter_context(patch.dict(sys.modules, dict(_packages())))
        # Its sizes depend on the documents: host work on real tensors.
        packing = import_module("megagrow_kernels.packing")
        stack.enter_context(patch.object(packing, "pack", _on_host(packing.pack)))
        stack.enter_context(_accelerator())
        yield


@contextmanager
def _accelerator() -> Iterator[None]:
    """DeepSpeed keeps its accelerator in a global, which decides on devices and streams."""
    real = deepspeed.accelerator.real_accelerator
    before = real.get_accelerator()
    real.set_accelerator(SimulatedAccelerator())
    try:
        yield
    finally:
        real.set_accelerator(before)


def _replacements(recorder: Recorder) -> Iterator[tuple[Any, str, Any]]:
    # torch builds these tensors in C++ on the device, which has no kernels.
    yield torch, "tensor", _through_host(torch.tensor)
    yield torch, "as_tensor", _through_host(torch.as_tensor)
    yield Tensor, "new_tensor", _new_tensor
    # FakeTensor reads a list element by element: one wait each, where a device has one.
    yield FakeTensor, "tolist", lambda tensor: _nested(recorder.read(tensor, "tolist"), tensor)
    # Fused on a GPU, with fewer saved tensors; other devices get the composite operations.
    yield F, "rms_norm", _FusedRMSNorm.apply
    yield F, "scaled_dot_product_attention", _fused_attention
    # A subclass of Tensor without data, which FakeTensorMode refuses. It selects a kernel only.
    yield bias, "causal_lower_right", lambda queries, keys: None
    # Objects are sent as tensors whose sizes depend on values. A rank receives only its own.
    yield dist, "all_gather_object", _all_gather_object
    yield dist, "broadcast_object_list", lambda *args, **options: None
    # ZeRO 3 compares the order of its modules with rank 0, which is not simulated.
    coordinator = deepspeed.runtime.zero.partitioned_param_coordinator
    yield coordinator, "assert_ints_same_as_other_ranks", lambda integers: None
    # FakeTensorMode holds weak references to its tensors, which the original refuses.
    yield torch.utils, "swap_tensors", _swap_tensors
    # Host memory is pinned by the device's driver.
    yield Tensor, "pin_memory", mark_pinned
    yield Tensor, "is_pinned", is_pinned
    # Streams of C++; the simulation executes in order.
    yield Tensor, "record_stream", lambda tensor, stream: None
    # A conversion, here to the same dtype and device, makes new parameters without attributes.
    yield torch.nn.Module, "_apply", _unless_simulated(torch.nn.Module._apply)
    yield torch, "clear_autocast_cache", autocast.copies.clear


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **options)

    return run


def _through_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def tensor(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, FakeTensor) and make is not torch.tensor:
            return data.to(device=device or data.device, **options)
        if device is None or torch.device(device).type != NAME:
            return make(data, *args, device=device, **options)
        host = _on_host(make)(_plain(data), *args, **options)
        return host.to(device)

    return tensor


def _plain(data: Any) -> Any:
    """Return data without tensors, which torch reads from the device."""
    if isinstance(data, (list, tuple)):
        return [_plain(each) for each in data]
    return data.tolist() if isinstance(data, FakeTensor) else data


def _new_tensor(like: Tensor, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    return torch.tensor(data, dtype=dtype or like.dtype, device=device or like.device)


def _unless_simulated(convert: Callable[..., Any]) -> Callable[..., Any]:
    def run(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        on_device = any(is_simulated(each) for each in module.parameters())
        return module if on_device else convert(module, *args, **options)

    return run


def _nested(values: list[Any], tensor: Tensor) -> Any:
    """Return flat values in the nesting of `Tensor.tolist`."""
    if tensor.dim() == 0:
        return values[0]
    for size in reversed(tensor.shape[1:]):
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return values


def _swap_tensors(first: Tensor, second: Tensor) -> None:
    first.__class__, second.__class__ = second.__class__, first.__class__
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    torch._C._swap_tensor_impl(first, second)


def _all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
    objects[:] = [mine] * len(objects)


class _FusedRMSNorm(torch.autograd.Function):
    """Memory of CUDA's fused RMSNorm: it keeps its input and one fp32 value per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


class _FusedAttention(torch.autograd.Function):
    """Memory of flash, efficient and cuDNN attention: inputs, output and one fp32 per query.

    A bool mask is converted to the dtype of the queries in each call, and kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, bias = torch.empty_like(q), () if mask is None else (mask.to(q.dtype),)
        statistics = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, statistics, *bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> Tensor:
    return _FusedAttention.apply(*(autocast.cast(x, NAME) for x in (q, k, v)), attn_mask)


class _FusedScan(torch.autograd.Function):
    """Memory of mamba-ssm: inputs and, for every chunk of tokens, two fp32 numbers per state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, *inputs: Tensor) -> Tensor:
        batch, channels, tokens = x.shape
        sizes = batch, channels, -(-tokens // MAMBA_SSM_CHUNK), 2 * A.shape[1]
        ctx.save_for_backward(x, A, *inputs, x.new_empty(sizes, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:-1])


class _FusedConvolution(torch.autograd.Function):
    """Memory of causal-conv1d: its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def _packages() -> Iterator[tuple[str, ModuleType]]:
    """Packages of CUDA kernels, published as source only: their functions with the same memory."""
    functions: dict[str, dict[str, Callable[..., Tensor]]] = {
        "flash_attn": {
            "flash_attn_func": _fused_attention,
            "flash_attn_varlen_func": lambda q, k, v, *_, **options: _fused_attention(q, k, v),
        },
        "causal_conv1d": {
            "causal_conv1d_fn": lambda x, weight, bias, **_: _FusedConvolution.apply(
                x, weight, bias
            ),
        },
        "mamba_ssm": {},
        "mamba_ssm.ops.selective_scan_interface": {
            "selective_scan_fn": lambda x, dt, A, B, C, D, delta_bias, **_: _FusedScan.apply(
                x, A, dt, B, C, D, delta_bias
            ),
        },
    }
    for name, contents in functions.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(contents)
        yield name, module
