"""Memory of zeros that costs nothing until it is written."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor


def zeros(numel: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(numel,) zeros.

    On a CPU they are mapped, in huge pages where the system has them, and not filled: most of what
    an empty engine holds is written over by initial weights, a checkpoint or a growth.
    """
    if torch.device(device).type != "cpu" or numel == 0:
        # Not torch.zeros: while an engine is built, that one ends up here.
        return torch.full((numel,), 0, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=flags)
    with suppress(AttributeError, OSError):  # another system than Linux, or Linux without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape, dtype and device."""
    return zeros(tensor.numel(), tensor.dtype, tensor.device).view(tensor.shape)
