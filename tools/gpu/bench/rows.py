"""The ops that memory bounds: RMSNorm, with and without the addition, RoPE, and SwiGLU."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.rms_norm import add_rms_norm, rms_norm
from megagrow_kernels.rope import rope
from megagrow_kernels.swiglu import swiglu
from tools.gpu.bench import others
from tools.gpu.bench.case import OURS, Case, Place, Result
from tools.gpu.bench.work import row_work

EPS = 1e-5
Contenders = dict[str, Callable[[], Result]]


def cases(place: Place) -> Iterator[Case]:
    """16k to 32k tokens, in the widths of the models; large enough that what stays in the cache at
    the end of a call is a small part of it."""
    for tokens, width in (
        [(7, 24)] if place.smoke else [(32768, 2048), (16384, 4096), (16384, 8192)]
    ):
        yield _rms_norm(place, tokens, width)
        yield _add_rms_norm(place, tokens, width)
    yield _rope(place, *((2, 5, 4, 2, 8) if place.smoke else (8, 4096, 32, 8, 128)))
    for tokens, width in [(7, 24)] if place.smoke else [(16384, 5632), (16384, 11008)]:
        yield _swiglu(place, tokens, width)


def _rms_norm(place: Place, tokens: int, width: int) -> Case:
    x, weight = place.draw(tokens, width), place.draw(width)
    compiled = place.compiled(lambda x, weight: reference.rms_norm(x, weight, EPS))
    contenders: Contenders = {
        OURS: lambda: rms_norm(x, weight, EPS),
        "compile": lambda: compiled(x, weight),
        "torch": lambda: F.rms_norm(x, (width,), weight, EPS),
    }
    if liger := others.liger("liger_rms_norm"):
        contenders["liger"] = lambda: liger(x, weight, EPS, 0.0, "llama", False)
    work = row_work("rms_norm", x.numel(), x.element_size())
    return Case("rms_norm", f"{tokens} x {width}", contenders, (x, weight), *work)


def _add_rms_norm(place: Place, tokens: int, width: int) -> Case:
    x, residual, weight = place.draw(tokens, width), place.draw(tokens, width), place.draw(width)

    compiled = place.compiled(lambda *given: reference.add_rms_norm(*given, EPS))
    contenders: Contenders = {
        OURS: lambda: add_rms_norm(x, residual, weight, EPS),
        "compile": lambda: compiled(x, residual, weight),
    }
    if liger := others.liger("liger_fused_add_rms_norm"):
        contenders["liger"] = lambda: liger(x, residual, weight, EPS, 0.0, "llama", False)
    work = row_work("add_rms_norm", x.numel(), x.element_size())
    return Case("add_rms_norm", f"{tokens} x {width}", contenders, (x, residual, weight), *work)


def _rope(place: Place, batch: int, sequence: int, heads: int, groups: int, head_dim: int) -> Case:
    q = place.draw(batch, sequence, heads, head_dim)
    k = place.draw(batch, sequence, groups, head_dim)
    positions = torch.arange(sequence, device=place.device).expand(batch, -1)
    frequencies = 1e4 ** -(torch.arange(head_dim // 2, device=place.device) * 2 / head_dim)
    cos, sin = (t.to(place.dtype) for t in reference.rope_tables(positions, frequencies))

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return reference.apply_rope(q, cos, sin), reference.apply_rope(k, cos, sin)

    compiled = place.compiled(eager)
    contenders: Contenders = {
        OURS: lambda: rope(q, k, cos, sin),
        "compile": lambda: compiled(q, k),
    }
    if liger := others.liger("liger_rope"):
        turned = [x.transpose(1, 2) for x in (q, k)]
        contenders["liger"] = lambda: liger(*turned, cos[:, :, 0], sin[:, :, 0])
    work = row_work("rope", q.numel() + k.numel(), q.element_size())
    name = f"{batch} x {sequence}, {heads}/{groups} heads of {head_dim}"
    return Case("rope", name, contenders, (q, k), *work)


def _swiglu(place: Place, tokens: int, width: int) -> Case:
    gate, up = place.draw(tokens, width), place.draw(tokens, width)
    compiled = place.compiled(reference.swiglu)
    contenders: Contenders = {
        OURS: lambda: swiglu(gate, up),
        "compile": lambda: compiled(gate, up),
    }
    if liger := others.liger("liger_swiglu"):
        contenders["liger"] = lambda: liger(gate, up)
    work = row_work("swiglu", gate.numel(), gate.element_size())
    return Case("swiglu", f"{tokens} x {width}", contenders, (gate, up), *work)
