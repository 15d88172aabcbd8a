"""Benchmark of the ops of Mamba: the causal convolution and the selective scan."""

from collections.abc import Iterator

import torch

from megagrow_kernels import mamba_ssm_backend, reference
from megagrow_kernels.causal_conv import causal_conv
from megagrow_kernels.selective_scan import selective_scan
from tools.gpu.bench import baselines
from tools.gpu.bench.case import OURS, BenchmarkCase, DeviceSetup
from tools.gpu.bench.work import row_work

TAPS, STATES = 4, 16
"""Sizes of all published Mamba models (Gu and Dao 2023)."""


def cases(setup: DeviceSetup) -> Iterator[BenchmarkCase]:
    """Yield cases of 16k tokens: the channels of models of 370M, 1.4B and 2.8B parameters.

    Rows are one document each, since mamba-ssm has no documents.
    """
    for sizes in (
        [(2, 7, 12)] if setup.smoke else [(8, 2048, 2048), (8, 2048, 4096), (2, 8192, 5120)]
    ):
        yield _causal_conv(setup, *sizes)
        yield _selective_scan(setup, *sizes)


def _causal_conv(setup: DeviceSetup, batch: int, sequence: int, channels: int) -> BenchmarkCase:
    x = setup.draw(batch, sequence, channels)
    inputs = (x, setup.draw(channels, TAPS), setup.draw(channels))
    compiled = setup.compile(reference.causal_conv)
    implementations = {
        OURS: lambda: causal_conv(*inputs),
        "compile": lambda: compiled(*inputs),
    }
    if baselines.is_installed("causal-conv1d"):
        implementations["causal-conv1d"] = lambda: mamba_ssm_backend.causal_conv(*inputs)
    work = row_work("causal_conv", x.numel(), x.element_size())
    return BenchmarkCase("causal_conv", _name(x), implementations, inputs, *work)


def _selective_scan(setup: DeviceSetup, batch: int, sequence: int, channels: int) -> BenchmarkCase:
    x, dt = (setup.draw(batch, sequence, channels) for _ in range(2))
    B, C = (setup.draw(batch, sequence, STATES) for _ in range(2))
    D, dt_bias = setup.draw(channels), setup.draw(channels)
    A = -torch.arange(1.0, STATES + 1, device=x.device).repeat(channels, 1)
    inputs = (x, dt, A.requires_grad_(), B, C, D, dt_bias)
    implementations = {OURS: lambda: selective_scan(*inputs)}
    if baselines.is_installed("mamba-ssm"):
        implementations["mamba-ssm"] = lambda: mamba_ssm_backend.selective_scan(*inputs)
    work = row_work("selective_scan", x.numel(), x.element_size())
    return BenchmarkCase("selective_scan", _name(x), implementations, inputs, *work)


def _name(x: torch.Tensor) -> str:
    return " x ".join(str(size) for size in x.shape)
