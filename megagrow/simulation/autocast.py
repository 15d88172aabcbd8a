"""Autocast on the simulated device: torch defines it for no private-use device.

Matrix products compute in the autocast dtype, and the copies of weights are kept until autocast
ends, as on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_KEY = "AutocastPrivateUse1"
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm")

copies: Any = WeakIdKeyDictionary()
"""Copies of weights in the autocast dtype; torch clears its own by `torch.clear_autocast_cache`."""


def register_autocast(device_type: str) -> list[torch.library.Library]:
    """Register autocast for a private-use device type; it lasts as long as the result."""
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, _KEY)
    casts = torch.library.Library("aten", "IMPL")
    for name in _PRODUCTS:
        casts.impl(name, _casting(getattr(torch.ops.aten, name).default, device_type), _KEY)
    return [fallback, casts]


def _casting(product: Any, device_type: str) -> Callable[..., Any]:
    autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

    def run(*args: Any, **options: Any) -> Any:
        args = tuple(cast(each, device_type) for each in args)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return product(*args, **options)

    return run


def cast(tensor: Any, device_type: str) -> Any:
    """Return a tensor in the autocast dtype of a device type, if it is enabled there."""
    if not torch.is_autocast_enabled(device_type):
        return tensor
    dtype = torch.get_autocast_dtype(device_type)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    if not (tensor.is_leaf and tensor.requires_grad):
        return tensor.to(dtype)
    if tensor not in copies:
        copies[tensor] = tensor.to(dtype)
    return copies[tensor]
