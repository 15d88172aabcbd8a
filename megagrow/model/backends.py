"""Backend selection for each operation of a stage: a pure function of config, workload and machine.

`auto` selects the fastest backend that is known to be correct:

- CPU, or fp32 on any device: torch.
- GPU: Triton, which reads and writes each element once, if the self-check of the stage's kernels
  passes on it (`train/kernel_selection.py`); else torch.
- Attention with packed documents or a sliding window: Triton if it passes, else flash-attn if
  available, else torch. torch's attention also computes masked positions.
- Scan: Triton if it passes, else mamba-ssm if available, else torch, which stores more and has more
  passes over memory.
- Other attention: torch, with cuDNN on Hopper and newer. It has the best published throughput
  there; it is not yet measured here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.config.stage import KernelsConfig
from megagrow.errors import ResourceError
from megagrow.model.machine import Machine

OPERATIONS = {
    "attention": ("triton", "flash_attn", "sdpa", "reference"),
    "norm": ("triton", "torch"),
    "pointwise": ("triton", "torch"),
    "loss": ("triton", "torch"),
    "scan": ("triton", "mamba_ssm", "torch"),
}
"""Backends of each operation, by the names of the `kernels` section of a run file."""

LEAST_CAPABILITY = 80
"""Minimum compute capability of the Triton kernels and of flash-attn: Ampere, the first with bf16
matrix products."""

CHECKED_CODE: dict[str, tuple[int, ...]] = {"3.6.0": (), "3.7.1": (90,), "3.9.0": (90,)}
"""Compute capabilities for which the machine code of all Triton kernels has no problems, by version
of Triton: the oldest supported, that of torch's CUDA build, the newest. The check is
`tools/gpu/triton_versions.py`."""

DETERMINISTIC_FLASH = (2, 4, 1)
"""Oldest flash-attn with a deterministic backward pass."""

WINDOWED_FLASH = (2, 3)
"""Oldest flash-attn with sliding windows."""

CONV1D_TAPS = (2, 3, 4)
"""Taps that causal-conv1d supports."""

LARGEST_HEAD = 256
"""Maximum head_dim of Triton's attention and flash-attn; it must also be a multiple of 8."""


@dataclass(frozen=True)
class KernelWorkload:
    """Properties of a stage that determine which backends can run it."""

    dtype: torch.dtype
    """Dtype of the forward and backward pass: fp32 or bf16."""
    head_dim: int
    packed: bool
    """True if attention is restricted to documents (`data.reset_attention_mask`)."""
    deterministic: bool = False
    """True if backward passes must sum in a fixed order (`deterministic_mode`)."""
    windowed: bool = False
    """True if a layer's attention has a sliding window."""
    conv_taps: int | None = None
    """Taps of the convolution of Mamba layers; None without such layers."""

    @property
    def sparse(self) -> bool:
        """True if attention skips earlier tokens, by documents or by a window."""
        return self.packed or self.windowed


@dataclass(frozen=True)
class Backends:
    """Selected backend of each operation."""

    attention: str
    norm: str
    pointwise: str
    loss: str
    scan: str = "torch"


def uses_bf16(run: RunConfig, device: torch.device) -> bool:
    """Return True if the forward and backward pass run in bf16."""
    return run.precision == "bf16" or (run.precision == "auto" and device.type != "cpu")


def kernel_workload(run: RunConfig, index: int, device: torch.device) -> KernelWorkload:
    """Return the workload of stage `index` of a run on a device."""
    stage = run.stages[index]
    dtype = torch.bfloat16 if uses_bf16(run, device) else torch.float32
    packed, deterministic = stage.data.reset_attention_mask, run.deterministic_mode
    return model_workload(stage.model, dtype, packed, deterministic)


def model_workload(
    model: ModelConfig, dtype: torch.dtype, packed: bool = False, deterministic: bool = False
) -> KernelWorkload:
    """Return the workload of a model."""
    windowed, taps = model.sliding_window is not None, model.mamba_d_conv
    return KernelWorkload(dtype, model.head_dim, packed, deterministic, windowed, taps)


def choose(
    config: KernelsConfig, machine: Machine, work: KernelWorkload, at: str = "kernels"
) -> Backends:
    """Return the backends of a stage.

    `at` is the key of `config` in the run file, for error messages. Raises ResourceError, which
    lists all unavailable backends.
    """
    if unavailable := list(problems(config, machine, work, at)):
        raise ResourceError("; ".join(unavailable))
    return Backends(**{name: backend_of(name, config, machine, work) for name in OPERATIONS})


def backend_of(
    operation: str, config: KernelsConfig, machine: Machine, work: KernelWorkload
) -> str:
    """Return the configured backend of an operation, with `auto` resolved."""
    requested: str = getattr(config, operation)
    return automatic(operation, machine, work) if requested == "auto" else requested


def problems(
    config: KernelsConfig, machine: Machine, work: KernelWorkload, at: str
) -> Iterator[str]:
    """Yield an error message for each requested backend that the machine cannot run."""
    for operation in OPERATIONS:
        backend = getattr(config, operation)
        if backend != "auto" and (reason := obstacle(operation, backend, machine, work)):
            fallback = automatic(operation, machine, work)
            yield f"{at}.{operation} = {backend}: {reason}; auto selects {fallback}"


def automatic(operation: str, machine: Machine, work: KernelWorkload) -> str:
    """Return the choice of `auto`: the first available backend, in order of expected speed."""
    on_gpu = machine.device == "cuda" and work.dtype != torch.float32
    order = ["triton"] if on_gpu and operation in machine.checks else []
    if operation == "attention":
        order = [*order, "flash_attn", "sdpa"] if on_gpu and work.sparse else ["sdpa"]
    elif operation == "scan" and on_gpu and work.conv_taps is not None:
        order += ["mamba_ssm", "torch"]
    else:
        order.append("torch")
    return next(name for name in order if obstacle(operation, name, machine, work) is None)


def obstacle(operation: str, backend: str, machine: Machine, work: KernelWorkload) -> str | None:
    """Return the reason why a backend cannot run an operation on a machine; None if it can."""
    if backend == "triton":
        return _triton_obstacle(operation, machine, work)
    if backend == "flash_attn":
        return _flash_attn_obstacle(machine, work)
    if backend == "mamba_ssm":
        return _mamba_ssm_obstacle(machine, work)
    return None


def _triton_obstacle(operation: str, machine: Machine, work: KernelWorkload) -> str | None:
    if not machine.triton:
        return "Triton is not installed"
    if machine.device == "cpu" and not machine.interpreter:
        return (
            "the Triton kernels need a GPU; to run them on a CPU in Triton's interpreter, set "
            "TRITON_INTERPRET=1 before the start"
        )
    if machine.device == "cpu" and work.dtype == torch.bfloat16:
        return "Triton's interpreter computes bf16 wrongly; set precision to fp32"
    head_dim = _head_dim_obstacle(work) if operation == "attention" else None
    return _capability_obstacle(machine) or head_dim or machine.checks.get(operation)


def _flash_attn_obstacle(machine: Machine, work: KernelWorkload) -> str | None:
    if not machine.flash_attn:
        return "flash-attn is not installed (the extra `flash`)"
    if machine.device == "cpu":
        return "flash-attn needs a GPU"
    if work.deterministic and machine.flash_attn_version < DETERMINISTIC_FLASH:
        return "deterministic_mode needs flash-attn 2.4.1 or newer"
    if work.windowed and machine.flash_attn_version < WINDOWED_FLASH:
        return "sliding windows need flash-attn 2.3 or newer"
    if work.dtype == torch.float32:
        return "flash-attn supports only bf16 and fp16, but the stage computes in fp32"
    return _capability_obstacle(machine) or _head_dim_obstacle(work)


def _mamba_ssm_obstacle(machine: Machine, work: KernelWorkload) -> str | None:
    if not machine.mamba_ssm:
        return "mamba-ssm and causal-conv1d are not both installed (the extra `mamba`)"
    if machine.device == "cpu":
        return "mamba-ssm needs a GPU"
    if work.packed:
        return "mamba-ssm cannot reset the state at document boundaries (data.reset_attention_mask)"
    if work.deterministic:
        return "the backward pass of mamba-ssm is not deterministic (deterministic_mode)"
    if work.conv_taps not in (None, *CONV1D_TAPS):
        return f"causal-conv1d supports 2 to 4 taps, but model.mamba_d_conv = {work.conv_taps}"
    return _capability_obstacle(machine)


def _capability_obstacle(machine: Machine) -> str | None:
    if machine.device == "cpu" or machine.capability >= LEAST_CAPABILITY:
        return None
    return f"needs a GPU of sm_{LEAST_CAPABILITY} or newer; this one is sm_{machine.capability}"


def _head_dim_obstacle(work: KernelWorkload) -> str | None:
    if work.head_dim % 8 == 0 and work.head_dim <= LARGEST_HEAD:
        return None
    return f"needs a head_dim that is a multiple of 8 up to {LARGEST_HEAD}, not {work.head_dim}"
