"""One thing to be measured: an op on given inputs, computed by megagrow and by others.

Each result is a record, a flat dict: `kind` ("timing"), `op`, `case`, the case's features, `way`
(forward, backward, both), `by`, and `seconds` with `bytes` and `flops` of the work, or `problem`,
why there are none. What others cannot do is a finding, so nothing that they raise ends the run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tools.gpu.bench.clock import Call, Clock, CudaClock, OnceClock
from tools.gpu.bench.work import NOTHING, Work

OURS = "megagrow"
Record = dict[str, Any]
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Where it is measured: a GPU in bf16, or in smoke the CPU in fp32, with tiny shapes."""

    device: torch.device
    smoke: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.smoke else torch.bfloat16

    def clock(self) -> Clock:
        """What times the calls; in smoke each is made once and its seconds mean nothing."""
        return OnceClock() if self.smoke else CudaClock(self.device)

    def draw(self, *shape: int, gradient: bool = True) -> Tensor:
        """Normal random numbers."""
        x = torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)
        return x.requires_grad_(gradient)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By torch.compile, for exactly these shapes; in smoke without generating code."""
        backend = "aot_eager" if self.smoke else "inductor"
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


@dataclass(frozen=True)
class Case:
    """An op on inputs of one shape."""

    op: str
    name: str
    contenders: Mapping[str, Callable[[], Result]]
    """By whom -> a call that computes the outputs from `leaves`."""
    leaves: tuple[Tensor, ...]
    """The inputs that get a gradient."""
    forward: Work = NOTHING
    backward: Work = NOTHING
    together: bool = False
    """Whether forward and backward are measured as one, where somebody does both at once."""
    features: Mapping[str, int | str] = field(default_factory=dict)
    restore: Call | None = None
    """Writes anew what the calls overwrite; not measured."""


def ways(case: Case) -> Iterator[tuple[str, Work, dict[str, Call]]]:
    """What is to be timed: the way, its work, and by whom the call. The call of a backward pass
    is made of the outputs that the contender's forward pass gives here, once."""
    if case.together:
        calls = {name: _both(call, case.leaves) for name, call in case.contenders.items()}
        yield "both", case.forward + case.backward, calls
        return
    yield "forward", case.forward, dict(case.contenders)
    if case.leaves:
        calls = {name: _backward(call, case.leaves) for name, call in case.contenders.items()}
        yield "backward", case.backward, calls


def measure(case: Case, clock: Clock) -> Iterator[Record]:
    """The records of a case: all ways, all contenders. megagrow's own errors are records too."""
    for way, work, calls in ways(case):
        problems = {name: problem for name, call in calls.items() if (problem := _problem(call))}
        seconds = clock.compare(
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
    """A call that goes backward through one forward pass again and again. The forward pass is made
    at the first call, so that its errors come with it."""
    made: list[tuple[Result, list[Tensor]]] = []

    def again() -> object:
        if not made:
            outputs = call()
            listed = outputs if isinstance(outputs, tuple) else (outputs,)
            made.append((outputs, [torch.randn_like(y) for y in listed]))
        outputs, gradients = made[0]
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return again


def _both(call: Callable[[], Result], leaves: tuple[Tensor, ...]) -> Call:
    def once() -> object:
        outputs = call()
        listed = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad([y.sum() for y in listed], leaves) if leaves else outputs

    return once


def _problem(call: Call) -> str | None:
    """Why a call cannot be made, in one line; None if it can."""
    try:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # an error of the kernel itself comes later than its launch
    except Exception as error:  # whatever other libraries raise
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None
