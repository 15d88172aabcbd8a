"""Launch kernels on a GPU, in Triton's interpreter, or compile them without running.

The device of the tensors selects the mode, so the code that launches a kernel is written once:

- GPU tensors: the kernel runs.
- CPU tensors: the kernel runs in the interpreter, which requires TRITON_INTERPRET=1 to be set
  before this package is imported.
- meta tensors: the kernel is compiled for the active target, exactly as a launch with such
  tensors compiles it, and stays in Triton's cache.

Kernels accept bf16, fp16 and fp32 inputs.
"""

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
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=True, **options)
    else:
        _check_interpreted(kernel, arguments)
        kernel[grid](*arguments, **options)


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors share one of the FLOATS dtypes and one device.

    The message names `op` and the tensors. None marks an absent optional tensor.
    """
    present = {name: x for name, x in tensors.items() if x is not None}
    formats = {(x.dtype, x.device) for x in present.values()}
    if len(formats) > 1 or next(iter(formats))[0] not in FLOATS:
        listing = ", ".join(f"{name} is {x.dtype} on {x.device}" for name, x in present.items())
        raise ValueError(f"{op} requires one dtype of bf16, fp16, fp32 on one device: {listing}")


def architecture(device: torch.device) -> int:
    """Return the compute capability to compile for: 80, 90, 100; INTERPRETER on a CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return int(driver.active.get_current_target().arch) if device.type == "meta" else INTERPRETER


def programs(device: torch.device) -> int:
    """Return the number of programs that fill a device once: its streaming multiprocessors."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
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
