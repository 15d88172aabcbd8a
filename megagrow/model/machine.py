"""Capabilities of the machine for the model's operations, detected once and passed as a value."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class Machine:
    """Properties of a device that determine its available backends."""

    device: str
    """`cuda` or `cpu`."""
    capability: int = 0
    """Compute capability of a GPU, such as 80, 90 or 100; 0 for a CPU."""
    triton: bool = False
    """True if Triton is installed."""
    checks: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    """Result of the self-check of the Triton kernels of a stage, by operation: None if they passed,
    else the reason why not. An operation is missing if its kernels were not checked."""
    interpreter: bool = False
    """True if Triton kernels run in its interpreter (TRITON_INTERPRET=1 before the start)."""
    flash_attn: bool = False
    """True if flash-attn is installed."""
    flash_attn_version: tuple[int, ...] = ()
    """Its version, without suffixes; empty if unknown."""
    mamba_ssm: bool = False
    """True if mamba-ssm and causal-conv1d are installed."""


def machine_of(device: torch.device) -> Machine:
    """Return the capabilities of a device of this process."""
    capability = 0
    if device.type != "cpu":
        major, minor = torch.get_device_module(device).get_device_capability(device)
        capability = 10 * major + minor
    triton = find_spec("triton") is not None
    return Machine(
        "cpu" if device.type == "cpu" else "cuda",
        capability,
        triton,
        interpreter=triton and _interpreter_enabled(),
        flash_attn=find_spec("flash_attn") is not None,
        flash_attn_version=_flash_attn_version(),
        mamba_ssm=all(find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d")),
    )


def _flash_attn_version() -> tuple[int, ...]:
    try:
        numbers = re.match(r"\d+(\.\d+)*", version("flash-attn"))
    except PackageNotFoundError:
        return ()
    return () if numbers is None else tuple(map(int, numbers[0].split(".")))


def _interpreter_enabled() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
