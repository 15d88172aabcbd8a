"""What kernels take: bf16, fp16 and fp32, of one type and on one device."""

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError, naming op and tensors, unless all have one type that kernels compute in
    and are on one device. None stands for a tensor that is not there."""
    given = {name: x for name, x in tensors.items() if x is not None}
    kinds = {(x.dtype, x.device) for x in given.values()}
    if len(kinds) > 1 or next(iter(kinds))[0] not in FLOATS:
        shown = ", ".join(f"{name} is {x.dtype} on {x.device}" for name, x in given.items())
        raise ValueError(f"{op} takes bf16, fp16 or fp32, one of them, on one device: {shown}")
