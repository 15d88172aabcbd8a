"""What this machine has for the model's operations, found out once and passed on as a value."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

CHECKED: frozenset[int] = frozenset()
"""Compute capabilities of GPUs on which all tests of the kernels have passed, by
`tools/gpu/gpu_check.py`: so far they have run in Triton's interpreter alone."""


@dataclass(frozen=True)
class Machine:
    """What decides which backends can run on a device."""

    device: str
    """`cuda`, or `cpu`."""
    capability: int = 0
    """Of a GPU: 80, 90, 100; 0 of a CPU."""
    triton: bool = False
    """Whether Triton is installed."""
    checked: bool = False
    """Whether Triton's kernels are known to compute rightly on such a GPU."""
    interpreter: bool = False
    """Whether Triton's kernels are interpreted: TRITON_INTERPRET=1 was set before the start."""
    flash_attn: bool = False
    """Whether flash-attn is installed."""


def machine_of(device: torch.device) -> Machine:
    """What stands behind a device of this process."""
    capability = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    triton = find_spec("triton") is not None
    return Machine(
        device.type,
        capability,
        triton,
        checked=capability in CHECKED,
        interpreter=triton and _interprets(),
        flash_attn=find_spec("flash_attn") is not None,
    )


def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
