"""Device on which kernel checks run, in the interpreter or compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.kernels.accuracy import check

Function = Callable[..., Any]


@dataclass(frozen=True)
class KernelDevice:
    """Device of the checks, and the divisor of large shapes on it."""

    device: str
    scale: int

    @property
    def dtypes(self) -> Sequence[torch.dtype]:
        both = (torch.float16, torch.bfloat16)
        return torch.float32, *(() if self.device == "cpu" else both)

    def of(self, size: int) -> int:
        """Return a large size, scaled down for the device."""
        return max(1, size // self.scale)

    def run(self, function: Function) -> Function:
        """Return the function wrapped to run on this device, with inputs and results on the CPU."""

        def call(*inputs: Tensor) -> Any:
            outputs = function(*(x.to(self.device) for x in inputs))
            return outputs.cpu() if isinstance(outputs, Tensor) else tuple(y.cpu() for y in outputs)

        return call

    def check_accuracy(self, kernel: Function, eager: Function, inputs: Sequence[Tensor]) -> None:
        """Check outputs and gradients of a kernel against fp64, in every precision."""
        for dtype in self.dtypes:
            check(self.run(kernel), self.run(eager), inputs, dtype)
