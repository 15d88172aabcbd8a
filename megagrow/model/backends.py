"""Which backend computes each operation of a stage: a pure function of config, work and machine.

`auto` selects the fastest validated backend. On a CPU, and for fp32,
these are torch's own operations. On GPUs on which the kernels were checked (`machine.CHECKED`) they
are Triton's, which read and write each number once; in attention too where documents are packed,
since torch's own also computes masked positions. Without documents torch's attention is used, by
way of cuDNN on Hopper and newer: the fastest that is published there, and no measurement of ours
says otherwise so far.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megagrow.config.schema import RunConfig
from megagrow.config.stage import KernelsConfig
from megagrow.errors import ResourceError
from megagrow.model.machine import Machine

OPERATIONS = {
    "attention": ("triton", "flash_attn", "sdpa", "reference"),
    "norm": ("triton", "torch"),
    "pointwise": ("triton", "torch"),
    "loss": ("triton", "torch"),
}
"""Backends of each operation, with the names used by `kernels` in a run file."""

LEAST_CAPABILITY = 80
"""Minimum compute capability for the Triton kernels and flash-attn: Ampere, the first with bf16
matrix products."""

LARGEST_HEAD = 256
"""Both attentions take a head_dim that is a multiple of 8 up to it."""


@dataclass(frozen=True)
class KernelWorkload:
    """Requirements of a stage on its backends."""

    dtype: torch.dtype
    """Dtype of the forward and backward pass: fp32 or bf16."""
    head_dim: int
    packed: bool
    """True if attention is limited to documents."""


@dataclass(frozen=True)
class Backends:
    """Backend of each operation."""

    attention: str
    norm: str
    pointwise: str
    loss: str


def uses_bf16(run: RunConfig, device: torch.device) -> bool:
    """Return True if the forward and backward pass run in bf16."""
    return run.precision == "bf16" or (run.precision == "auto" and device.type == "cuda")


def work_of(run: RunConfig, index: int, device: torch.device) -> KernelWorkload:
    """Return the requirements of a run's stage on the backends of a device."""
    dtype = torch.bfloat16 if uses_bf16(run, device) else torch.float32
    return KernelWorkload(dtype, run.stages[index].model.head_dim, run.data.reset_attention_mask)


def choose(
    config: KernelsConfig, machine: Machine, work: KernelWorkload, at: str = "kernels"
) -> Backends:
    """Return the backends of a stage.

    `at` is the position of its config in the run file, for errors. Raises an error that lists all
    unavailable backends.
    """
    if found := list(problems(config, machine, work, at)):
        raise ResourceError("; ".join(found))
    return Backends(**{name: backend_of(name, config, machine, work) for name in OPERATIONS})


def backend_of(
    operation: str, config: KernelsConfig, machine: Machine, work: KernelWorkload
) -> str:
    """Return the backend that a config names for an operation, or the choice of `auto`."""
    asked: str = getattr(config, operation)
    return automatic(operation, machine, work) if asked == "auto" else asked


def problems(
    config: KernelsConfig, machine: Machine, work: KernelWorkload, at: str
) -> Iterator[str]:
    """Return all requested backends that the machine cannot run, with reasons."""
    for operation in OPERATIONS:
        backend = getattr(config, operation)
        if backend != "auto" and (why := obstacle(operation, backend, machine, work)):
            taken = automatic(operation, machine, work)
            yield f"{at}.{operation} = {backend}: {why}; auto would take {taken}"


def automatic(operation: str, machine: Machine, work: KernelWorkload) -> str:
    """Return the choice of `auto`: the first available of the potentially fastest backends."""
    on_gpu = machine.device == "cuda" and work.dtype != torch.float32
    order = ["triton"] if on_gpu and machine.checked else []
    if operation == "attention":
        order = [*order, "flash_attn", "sdpa"] if on_gpu and work.packed else ["sdpa"]
    else:
        order.append("torch")
    return next(name for name in order if obstacle(operation, name, machine, work) is None)


def obstacle(operation: str, backend: str, machine: Machine, work: KernelWorkload) -> str | None:
    """Why a backend cannot compute an operation here; None if it can."""
    if backend == "triton":
        return _obstacle_to_triton(operation == "attention", machine, work)
    if backend == "flash_attn":
        return _obstacle_to_flash_attn(machine, work)
    return None


def _obstacle_to_triton(attention: bool, machine: Machine, work: KernelWorkload) -> str | None:
    if not machine.triton:
        return "Triton is not installed"
    if machine.device == "cpu" and not machine.interpreter:
        return (
            "Triton's kernels need a GPU; on a CPU they run in its interpreter alone, with "
            "TRITON_INTERPRET=1 set before the start"
        )
    if machine.device == "cpu" and work.dtype == torch.bfloat16:
        return "Triton's interpreter computes bf16 wrongly; set precision to fp32"
    return _too_old(machine) or (_wrong_head_dim(work) if attention else None)


def _obstacle_to_flash_attn(machine: Machine, work: KernelWorkload) -> str | None:
    if not machine.flash_attn:
        return "flash-attn is not installed (the extra `flash`)"
    if machine.device == "cpu":
        return "flash-attn needs a GPU"
    if work.dtype == torch.float32:
        return "flash-attn computes in bf16 and fp16 alone, and the stage in fp32"
    return _too_old(machine) or _wrong_head_dim(work)


def _too_old(machine: Machine) -> str | None:
    if machine.device == "cpu" or machine.capability >= LEAST_CAPABILITY:
        return None
    return f"needs a GPU from sm_{LEAST_CAPABILITY} on, and this one is sm_{machine.capability}"


def _wrong_head_dim(work: KernelWorkload) -> str | None:
    if work.head_dim % 8 == 0 and work.head_dim <= LARGEST_HEAD:
        return None
    return f"takes a head_dim that is a multiple of 8 up to {LARGEST_HEAD}, not {work.head_dim}"
