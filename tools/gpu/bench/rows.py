"""Benchmark of the memory-bound ops: RMSNorm, with and without residual, RoPE, and SwiGLU."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.rms_norm import add_rms_norm, rms_norm
from megagrow_kernels.rope import rope
from megagrow_kernels.swiglu import swiglu
from tools.gpu.bench import baselines
from tools.gpu.bench.case import OURS, BenchmarkCase, DeviceSetup, Result
from tools.gpu.bench.work import row_work

EPS = 1e-5
Implementations = dict[str, Callable[[], Result]]


def cases(setup: DeviceSetup) -> Iterator[BenchmarkCase]:
    """Yield cases of 16k to 32k tokens, in the widths of the models.

    The sizes are large enough that the cached data left at the end of a call is a small part.
    """
    for tokens, width in (
        [(7, 24)] if setup.smoke else [(32768, 2048), (16384, 4096), (16384, 8192)]
    ):
        yield _rms_norm(setup, tokens, width)
        yield _add_rms_norm(setup, tokens, width)
    yield _rope(setup, *((2, 5, 4, 2, 8) if setup.smoke else (8, 4096, 32, 8, 128)))
    for tokens, width in [(7, 24)] if setup.smoke else [(16384, 5632), (16384, 11008)]:
        yield _swiglu(setup, tokens, width)


def _rms_norm(setup: DeviceSetup, tokens: int, width: int) -> BenchmarkCase:
    x, weight = setup.draw(tokens, width), setup.draw(width)
    compiled = setup.compile(lambda x, weight: reference.rms_norm(x, weight, EPS))
    implementations: Implementations = {
        OURS: lambda: rms_norm(x, weight, EPS),
        "compile": lambda: compiled(x, weight),
        "torch": lambda: F.rms_norm(x, (width,), weight, EPS),
    }
    if liger := baselines.liger("liger_rms_norm"):
        implementations["liger"] = lambda: liger(x, weight, EPS, 0.0, "llama", False)
    work = row_work("rms_norm", x.numel(), x.element_size())
    return BenchmarkCase("rms_norm", f"{tokens} x {width}", implementations, (x, weight), *work)


def _add_rms_norm(setup: DeviceSetup, tokens: int, width: int) -> BenchmarkCase:
    x, residual, weight = setup.draw(tokens, width), setup.draw(tokens, width), setup.draw(width)

    compiled = setup.compile(lambda *inputs: reference.add_rms_norm(*inputs, EPS))
    implementations: Implementations = {
        OURS: lambda: add_rms_norm(x, residual, weight, EPS),
        "compile": lambda: compiled(x, residual, weight),
    }
    if liger := baselines.liger("liger_fused_add_rms_norm"):
        implementations["liger"] = lambda: liger(x, residual, weight, EPS, 0.0, "llama", False)
    work = row_work("add_rms_norm", x.numel(), x.element_size())
    return BenchmarkCase(
        "add_rms_norm", f"{tokens} x {width}", implementations, (x, residual, weight), *work
    )


def _rope(
    setup: DeviceSetup, batch: int, sequence: int, heads: int, groups: int, head_dim: int
) -> BenchmarkCase:
    q = setup.draw(batch, sequence, heads, head_dim)
    k = setup.draw(batch, sequence, groups, head_dim)
    positions = torch.arange(sequence, device=setup.device).expand(batch, -1)
    frequencies = 1e4 ** -(torch.arange(head_dim // 2, device=setup.device) * 2 / head_dim)
    cos, sin = (t.to(setup.dtype) for t in reference.rope_tables(positions, frequencies))

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return reference.apply_rope(q, cos, sin), reference.apply_rope(k, cos, sin)

    compiled = setup.compile(eager)
    implementations: Implementations = {
        OURS: lambda: rope(q, k, cos, sin),
        "compile": lambda: compiled(q, k),
    }
    if liger := baselines.liger("liger_rope"):
        transposed = [x.transpose(1, 2) for x in (q, k)]
        implementations["liger"] = lambda: liger(*transposed, cos[:, :, 0], sin[:, :, 0])
    work = row_work("rope", q.numel() + k.numel(), q.element_size())
    name = f"{batch} x {sequence}, {heads}/{groups} heads of {head_dim}"
    return BenchmarkCase("rope", name, implementations, (q, k), *work)


def _swiglu(setup: DeviceSetup, tokens: int, width: int) -> BenchmarkCase:
    gate, up = setup.draw(tokens, width), setup.draw(tokens, width)
    compiled = setup.compile(reference.swiglu)
    implementations: Implementations = {
        OURS: lambda: swiglu(gate, up),
        "compile": lambda: compiled(gate, up),
    }
    if liger := baselines.liger("liger_swiglu"):
        implementations["liger"] = lambda: liger(gate, up)
    work = row_work("swiglu", gate.numel(), gate.element_size())
    return BenchmarkCase("swiglu", f"{tokens} x {width}", implementations, (gate, up), *work)
