"""Simulated GPU on a machine without one: kernels are compiled and launched, but do nothing.

CPU tensors report a CUDA device, and Triton gets a driver whose load and launch do nothing. The
code that launches kernels is real, so its host time can be measured and its kernels listed; the
results of kernels are uninitialized memory.
"""

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda", 0)
REGISTERS, SPILLS, THREADS = 64, 0, 1024


class Driver:
    """Driver of a simulated H100."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *arguments: (object(), 1, REGISTERS, SPILLS, THREADS),
        unload_module=lambda module: None,
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


def force_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function to create or move tensors on the CPU instead of the GPU."""

    def on_cpu(*args: Any, **options: Any) -> Tensor:
        if "device" in options:
            options["device"] = "cpu"
        return function(
            *("cpu" if isinstance(arg, torch.device) else arg for arg in args), **options
        )

    return on_cpu


def simulated_gpu(programs: int) -> ExitStack:
    """Simulate a GPU with `programs` multiprocessors within the context."""
    properties = SimpleNamespace(multi_processor_count=programs)
    stack = ExitStack()
    for owner, name, replacement in (
        (Tensor, "device", property(lambda tensor: CUDA)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda device: (9, 0)),
        (torch.cuda, "get_device_properties", lambda device: properties),
    ):
        stack.enter_context(mock.patch.object(owner, name, replacement))
    for owner, name in ((torch, "empty"), (torch, "arange"), (torch, "tensor"), (Tensor, "to")):
        on_cpu = force_cpu(getattr(owner, name))
        stack.enter_context(mock.patch.object(owner, name, on_cpu))
    return stack
