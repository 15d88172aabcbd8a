"""Benchmark cases: an op on given inputs, computed by megagrow and by baselines.

Each result is a record, a flat dict: `kind` ("timing"), `op`, `case`, the case's features, `way`
(forward, backward, both), `by`, and either `seconds` with the `bytes` and `flops` of the work, or
`problem`, the error message. A failing baseline is a result, so its exceptions do not end the run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tools.gpu.bench.timer import Call, CudaTimer, SmokeTimer, Timer
from tools.gpu.bench.work import NOTHING, KernelWork

OURS = "megagrow"
Record = dict[str, Any]
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class DeviceSetup:
    """Benchmark device: a GPU in bf16, or for smoke runs the CPU in fp32 with tiny shapes."""

    device: torch.device
    smoke: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.smoke else torch.bfloat16

    def timer(self) -> Timer:
        """Return the timer; a smoke run makes each call once, its seconds are meaningless."""
        return SmokeTimer() if self.smoke else CudaTimer(self.device)

    def draw(self, *shape: int, gradient: bool = True) -> Tensor:
        """Return normally distributed random numbers."""
        x = torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)
        return x.requires_grad_(gradient)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function for static shapes; smoke runs skip code generation."""
        backend = "aot_eager" if self.smoke else "inductor"
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


@dataclass(frozen=True)
class BenchmarkCase:
    """An op on inputs of one shape."""

    op: str
    name: str
    implementations: Mapping[str, Callable[[], Result]]
    """Calls that compute the outputs from `leaves`, by implementation."""
    leaves: tuple[Tensor, ...]
    """Inputs that require gradients."""
    forward: KernelWork = NOTHING
    backward: KernelWork = NOTHING
    fused: bool = False
    """Measure forward and backward as one call, as needed if an implementation fuses them."""
    features: Mapping[str, int | str] = field(default_factory=dict)
    restore: Call | None = None
    """Restores inputs that the calls overwrite; not timed."""


def directions(case: BenchmarkCase) -> Iterator[tuple[str, KernelWork, dict[str, Call]]]:
    """Yield the direction, its work, and the calls by implementation.

    The call of a backward pass reuses the outputs of one forward pass of the same implementation.
    """
    if case.fused:
        calls = {
            name: _forward_backward(call, case.leaves)
            for name, call in case.implementations.items()
        }
        yield "both", case.forward + case.backward, calls
        return
    yield "forward", case.forward, dict(case.implementations)
    if case.leaves:
        calls = {name: _backward(call, case.leaves) for name, call in case.implementations.items()}
        yield "backward", case.backward, calls


def measure(case: BenchmarkCase, timer: Timer) -> Iterator[Record]:
    """Yield a record per direction and implementation, including megagrow's errors."""
    for way, work, calls in directions(case):
        problems = {name: problem for name, call in calls.items() if (problem := _error_of(call))}
        seconds = timer.compare(
            {name: call for name, call in calls.items() if name not in problems}, case.restore
        )
        for name in calls:
            record = {"kind": "timing", "op": case.op, "case": case.name, **case.features}
            record |= {"way": way, "by": name}
            if name in problems:
                yield record | {"problem": problems[name]}
            else:
                yield record | {
                    "seconds": seconds[name],
                    "bytes": work.bytes,
                    "flops": work.flops,
                }


def _backward(call: Callable[[], Result], leaves: tuple[Tensor, ...]) -> Call:
    """Return a call that repeats the backward pass of one forward pass.

    The forward pass runs in the first call, so that its errors are raised there.
    """
    saved: list[tuple[Result, list[Tensor]]] = []

    def backward() -> object:
        if not saved:
            outputs = call()
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            saved.append((outputs, [torch.randn_like(y) for y in tensors]))
        outputs, gradients = saved[0]
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return backward


def _forward_backward(call: Callable[[], Result], leaves: tuple[Tensor, ...]) -> Call:
    def forward_backward() -> object:
        outputs = call()
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad([y.sum() for y in tensors], leaves) if leaves else outputs

    return forward_backward


def _error_of(call: Call) -> str | None:
    """Return the error of a call in one line; None if it succeeds."""
    try:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernel errors surface after the launch
    except Exception as error:  # baselines raise arbitrary exceptions
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None
