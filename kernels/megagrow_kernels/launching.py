"""Launch kernels on a GPU, in Triton's interpreter, or compile them without running.

The device of the tensors selects the mode, so the code that launches a kernel is written once:

- GPU tensors: the kernel runs.
- CPU tensors: the kernel runs in the interpreter, which requires TRITON_INTERPRET=1 to be set
  before this package is imported.
- meta tensors: the kernel is compiled for the active target, exactly as a launch with such
  tensors compiles it, and stays in Triton's cache.

Kernels accept bf16, fp16 and fp32 inputs.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETER = 0
"""Compute capability that represents Triton's interpreter."""
INTERPRETER_PROGRAMS = 4
META_PROGRAMS = 132


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on a grid of programs, on the device of its first argument, a tensor.

    Raises RuntimeError for CPU tensors without the interpreter, and for bf16 in the interpreter,
    which silently computes bf16 wrongly (triton 3.6 to 3.9).
    """
    device = arguments[0].device
    if device.type == "meta":
        kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options)
    elif device.type == "cuda":
        if device.index == torch.cuda.current_device():
            kernel[grid](*arguments, enable_fp_fusion=True, **options)
            return
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=True, **options)
    else:
        _check_interpreted(kernel, arguments)
        kernel[grid](*arguments, **options)


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors share one of the FLOATS dtypes and one device.

    The message names `op` and the tensors. None marks an absent optional tensor.
    """
    present = [x for x in tensors.values() if x is not None]
    dtype, device = present[0].dtype, present[0].device
    if dtype in FLOATS and all(x.dtype == dtype and x.device == device for x in present[1:]):
        return
    listing = ", ".join(
        f"{name} is {x.dtype} on {x.device}" for name, x in tensors.items() if x is not None
    )
    raise ValueError(f"{op} requires one dtype of bf16, fp16, fp32 on one device: {listing}")


def blocks_of(size: int, block: int) -> int:
    """Return the number of blocks that cover `size` elements; triton.cdiv is ten times slower."""
    return -(-size // block)


@cache
def power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is not less than `size`, at least 1."""
    return 1 << max(size - 1, 0).bit_length()


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture(device: torch.device) -> int:
    """Return the compute capability to compile for: 80, 90, 100; INTERPRETER on a CPU."""
    if device.type == "cuda":
        return _capability(device)
    return int(driver.active.get_current_target().arch) if device.type == "meta" else INTERPRETER


def programs(device: torch.device) -> int:
    """Return the number of programs that fill a device once: its streaming multiprocessors."""
    if device.type == "cuda":
        return _multiprocessors(device)
    return META_PROGRAMS if device.type == "meta" else INTERPRETER_PROGRAMS


def _check_interpreted(kernel: Any, arguments: tuple[Any, ...]) -> None:
    if not isinstance(kernel, InterpretedFunction):
        raise RuntimeError(
            f"{kernel.__name__}: Triton kernels need a GPU; on a CPU they only run in Triton's "
            "interpreter, which requires TRITON_INTERPRET=1 to be set at start"
        )
    if any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in arguments):
        raise RuntimeError(
            f"{kernel.__name__}: Triton's interpreter computes bf16 wrongly; use fp32 or fp16"
        )
