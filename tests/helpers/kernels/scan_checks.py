"""GPU checks of the causal convolution and the selective scan; see `gpu_checks.py`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.causal_conv import causal_conv
from megagrow_kernels.selective_scan import selective_scan
from tests.helpers.kernels.accuracy import draw
from tests.helpers.kernels.kernel_device import Function, KernelDevice


def scan_cases(setup: KernelDevice) -> list[tuple[int, int, int]]:
    """Return tokens, channels and states."""
    return [(1, 1, 1), (setup.of(199), 40, 4), (setup.of(1024), setup.of(2048), 16)]


def scan_calls(setup: KernelDevice, dtype: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kernel calls of `scans` in one dtype."""
    for sequence, channels, states in scan_cases(setup):
        sizes = {"batch": 2, "sequence": sequence, "channels": channels}
        sizes |= dict.fromkeys(("dtype", "parameter_dtype"), dtype)
        yield "causal_conv", sizes | {"taps": 4}
        yield "selective_scan", sizes | {"states": states}


def scans(setup: KernelDevice) -> None:
    """Check the causal convolution and the selective scan of packed documents."""
    for sequence, channels, states in scan_cases(setup):
        starts = torch.arange(sequence) % 70 == 3
        options = {"starts": starts.expand(2, -1).to(setup.device)}
        x, dt = (draw(2, sequence, channels, seed=seed) for seed in range(2))
        B, C = (draw(2, sequence, states, seed=seed) for seed in range(2, 4))
        A, weight = draw(channels, states, seed=4), draw(channels, 4, seed=5)
        D, bias = draw(channels, seed=6), draw(channels, seed=7)
        kernel, eager = (partial(f, **options) for f in (causal_conv, reference.causal_conv))
        setup.check_accuracy(kernel, eager, [x, weight, bias])
        kernel, eager = (
            partial(scan_of_logarithms, f, **options)
            for f in (selective_scan, reference.selective_scan)
        )
        setup.check_accuracy(kernel, eager, [x, dt, A, B, C, D, bias])


def scan_of_logarithms(
    scan: Function, x: Tensor, dt: Tensor, log_A: Tensor, *rest: Tensor, **options: Any
) -> Tensor:
    """Return a scan with A = -exp(log_A), which is negative for every input."""
    A = -reference.widened(log_A).exp()
    return scan(x, dt, A, *rest, **options)
