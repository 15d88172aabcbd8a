"""Deterministic algorithms of torch, cuBLAS, cuDNN and NCCL (`deterministic_mode`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megagrow.parallel.launch import default_variables, variable

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_NVLS_ENABLE": ("0",)}
"""Variables and their values with which cuBLAS and NCCL sum in a fixed order."""


def deterministic_conflicts() -> list[str]:
    """Return a message for each variable of this process that prevents deterministic results."""
    return [
        f"deterministic_mode: {name} = {found}; unset it or set {' or '.join(values)}"
        for name, values in VARIABLES.items()
        if (found := variable(name)) is not None and found not in values
    ]


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms in a context, if enabled; enter it before a GPU is used.

    Variables that are set already are kept. torch raises RuntimeError where it has no deterministic
    algorithm.
    """
    if not enabled:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    flags = cudnn.deterministic, cudnn.benchmark
    with default_variables({name: values[0] for name, values in VARIABLES.items()}):
        try:
            torch.use_deterministic_algorithms(True)
            cudnn.deterministic, cudnn.benchmark = True, False
            memory.fill_uninitialized_memory = False  # `empty` is written before it is read
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            cudnn.deterministic, cudnn.benchmark = flags
            memory.fill_uninitialized_memory = fill
