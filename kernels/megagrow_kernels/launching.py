"""How a kernel is started: on a GPU, in Triton's interpreter, or compiled and no more.

What launches a kernel is written once and works for all three. Tensors on a GPU: it runs. Tensors
on a CPU: it runs in the interpreter, if TRITON_INTERPRET=1 was set before this package was
imported. Tensors on the meta device: it is compiled for the active target, exactly as a launch with
such tensors would compile it, and stays in Triton's cache.
"""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

INTERPRETER = 0
"""What stands for a compute capability in Triton's interpreter."""
INTERPRETER_PROGRAMS = 4
META_PROGRAMS = 132


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Starts a kernel on a grid of programs, on the device of its first argument, a tensor.

    Raises RuntimeError for tensors on a CPU without the interpreter, and for bf16 in it, since it
    computes bf16 wrongly without a word (triton 3.6 to 3.9).
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


def architecture(device: torch.device) -> int:
    """The compute capability that kernels are compiled for: 80, 90, 100; INTERPRETER on a CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return int(driver.active.get_current_target().arch) if device.type == "meta" else INTERPRETER


def programs(device: torch.device) -> int:
    """How many programs fill a device once: its streaming multiprocessors."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return META_PROGRAMS if device.type == "meta" else INTERPRETER_PROGRAMS


def _check_interpreted(kernel: Any, arguments: tuple[Any, ...]) -> None:
    if not isinstance(kernel, InterpretedFunction):
        raise RuntimeError(
            f"{kernel.__name__}: Triton kernels need a GPU; on a CPU they only run in Triton's "
            "interpreter, with TRITON_INTERPRET=1 set before the start"
        )
    if any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in arguments):
        raise RuntimeError(
            f"{kernel.__name__}: Triton's interpreter computes bf16 wrongly; use fp32 or fp16"
        )
