"""Capabilities of the machine for the model's operations, detected once and passed as a value."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

CHECKED: frozenset[int] = frozenset()
"""Compute capabilities of GPUs on which all tests of the kernels have passed, by
`tools/gpu/gpu_check.py`: so far they have run in Triton's interpreter alone."""


@dataclass(frozen=True)
class Machine:
    """Properties that determine the available backends of a device."""

    device: str
    """`cuda`, or `cpu`."""
    capability: int = 0
    """Compute capability of a GPU: 80, 90, 100; 0 for a CPU."""
    triton: bool = False
    """True if Triton is installed."""
    checked: bool = False
    """True if the Triton kernels are validated on this GPU type."""
    interpreter: bool = False
    """True if Triton kernels are interpreted: TRITON_INTERPRET=1 was set before the start."""
    flash_attn: bool = False
    """True if flash-attn is installed."""


def machine_of(device: torch.device) -> Machine:
    """Detect the capabilities of a device of this process."""
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
