"""Check kernels against their eager references on the device that will run them.

    python -m megagrow_kernels.self_check cuda:0 90 < calls.json

The arguments are the device and its compute capability. calls.json is a list of pairs
[op, arguments] as `calls.launches` takes them. The kernels are first compiled in parallel
processes. Each call then runs once, forward and backward, with random inputs; the reference runs in
fp64 on the same device. Widths, heads and dtypes are those of the call; the number of tokens is
limited. stdout has a JSON object once the device works, then one per call, in order: the worst
result of the call, or the error that it raised. After an error of the device, which would repeat in
all later calls, the exit code is DEVICE_LOST.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.accuracy import TOLERANCE, attention_terms, poisoned, segment_error
from megagrow_kernels.attention import attention
from megagrow_kernels.calls import EPS, draw
from megagrow_kernels.causal_conv import causal_conv
from megagrow_kernels.cross_entropy import combine_statistics, vocab_gradient_, vocab_statistics
from megagrow_kernels.packing import TILE, pack
from megagrow_kernels.rms_norm import add_rms_norm, rms_norm
from megagrow_kernels.rope import rope
from megagrow_kernels.selective_scan import selective_scan
from megagrow_kernels.swiglu import swiglu
from megagrow_kernels.warm_up import warm_up_in_parallel

MOST_ELEMENTS = 2**23
"""Elements of a matrix of tokens, which limits the tokens of row-wise ops and of the loss."""

MOST_STATES = 2**24
"""Numbers of all states of a selective scan: its reference stores them in fp64."""

MOST_SCORES, MOST_TOKENS = 2**26, 1024
"""Attention scores of the reference, and tokens of a row."""

DEVICE_LOST = 3
"""Exit code if the device failed in the last printed call; another process can check the rest."""

Function = Callable[..., Any]
Results = dict[str, Tensor]
Outcome = tuple[Results, Results, Results]
"""Results of a kernel, exact results, and the terms of those in which terms cancel."""


class Comparison(NamedTuple):
    """Largest error of one result of a kernel."""

    tensor: str
    error: float
    """Largest relative error of a segment; NaN or infinity if the kernel returned such values."""
    tolerance: float


def compare(op: str, device: torch.device, arguments: Mapping[str, Any]) -> list[Comparison]:
    """Run one call and its reference; return the error of each output and gradient."""
    torch.manual_seed(0)
    actual, exact, terms = _OPS[op](device, **arguments)
    return [
        Comparison(name, segment_error(x, exact[name], terms.get(name)), TOLERANCE[x.dtype])
        for name, x in actual.items()
    ]


def _differentiable(
    kernel: Function,
    eager: Function,
    outputs: Sequence[str],
    terms: Function | None = None,
    **inputs: Tensor,
) -> Outcome:
    """Return the outputs and the input gradients of a kernel, and those of its reference.

    terms(*inputs, *output gradients), in fp64, returns the terms of the input gradients.
    """
    leaves = [x.requires_grad_() for x in inputs.values()]
    with poisoned():
        found = _as_tuple(kernel(*leaves))
        upstream = [torch.randn_like(y) for y in found]
        gradients = torch.autograd.grad(found, leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = _as_tuple(eager(*wide))
    wide_upstream = [x.double() for x in upstream]
    exact = torch.autograd.grad(expected, wide, wide_upstream)
    of_inputs = [f"gradient of {name}" for name in inputs]
    names = [*outputs, *of_inputs]
    sizes = () if terms is None else terms(*(x.detach() for x in wide), *wide_upstream)
    return (
        dict(zip(names, [x.detach() for x in (*found, *gradients)], strict=True)),
        dict(zip(names, [x.detach() for x in (*expected, *exact)], strict=True)),
        dict(zip(of_inputs, sizes, strict=terms is not None)),
    )


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _rms_norm(
    device: torch.device, rows: int, width: int, dtype: str, parameter_dtype: str | None = None
) -> Outcome:
    x = draw(device, dtype, _limited(rows, width), width)
    weight = draw(device, parameter_dtype or dtype, width)
    kernel, eager = partial(rms_norm, eps=EPS), partial(reference.rms_norm, eps=EPS)
    return _differentiable(kernel, eager, ["norm"], x=x, weight=weight)


def _add_rms_norm(device: torch.device, rows: int, width: int, dtype: str) -> Outcome:
    x, residual = (draw(device, dtype, _limited(rows, width), width) for _ in range(2))
    weight = draw(device, dtype, width)
    kernel, eager = partial(add_rms_norm, eps=EPS), partial(reference.add_rms_norm, eps=EPS)
    inputs = {"x": x, "residual": residual, "weight": weight}
    return _differentiable(kernel, eager, ["norm", "sum"], **inputs)


def _rope(
    device: torch.device,
    batch: int,
    sequence: int,
    heads: int,
    groups: int,
    head_dim: int,
    dtype: str,
    table_dtype: str,
) -> Outcome:
    batch = min(batch, 2)
    sequence = _limited(sequence, batch * heads * head_dim)
    q = draw(device, dtype, batch, sequence, heads, head_dim)
    k = draw(device, dtype, batch, sequence, groups, head_dim)
    positions = torch.arange(sequence, device=device).expand(batch, -1)
    frequencies = 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=device)
    tables = reference.rope_tables(positions, frequencies)
    cos, sin = (table.to(getattr(torch, table_dtype)) for table in tables)

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.apply_rope(x, cos.double(), sin.double()) for x in (q, k))

    kernel = partial(rope, cos=cos, sin=sin)
    return _differentiable(kernel, eager, ["rotated q", "rotated k"], q=q, k=k)


def _swiglu(device: torch.device, rows: int, width: int, dtype: str) -> Outcome:
    gate, up = (draw(device, dtype, _limited(rows, width), width) for _ in range(2))
    return _differentiable(swiglu, reference.swiglu, ["output"], gate=gate, up=up)


def _attention(
    device: torch.device,
    batch: int,
    sequence: int,
    heads: int,
    groups: int,
    head_dim: int,
    dtype: str,
    window: int | None = None,
    queries: int | None = None,
) -> Outcome:
    """Compare a row that is one document, and a row of documents of 1, TILE - 1 and more tokens.

    A window is limited to half of a row, so that it hides keys. The queries remain the same share
    of a row as in the call.
    """
    limit = math.isqrt(MOST_SCORES // (2 * heads)) // TILE * TILE
    share = 1.0 if queries is None else queries / sequence
    sequence = min(sequence, MOST_TOKENS, max(limit, TILE))
    queries = max(1, round(share * sequence))
    window = None if window is None else min(window, max(sequence // 2, 1))
    positions = torch.arange(sequence)
    ids = torch.stack((torch.zeros_like(positions), _document_ids(positions)))
    inputs = {
        name: draw(device, dtype, 2, tokens, count, head_dim)
        for name, tokens, count in (
            ("q", queries, heads),
            ("k", sequence, groups),
            ("v", sequence, groups),
        )
    }
    packing, ids = pack(ids, *ids.shape, queries).to(device), ids.to(device)
    kernel = partial(attention, packing=packing, window=window)
    eager = partial(reference.attention, document_ids=ids, window=window)
    terms = partial(attention_terms, document_ids=ids, window=window)
    return _differentiable(kernel, eager, ["output"], terms, **inputs)


def _document_ids(positions: Tensor) -> Tensor:
    starts = (1, TILE, 2 * TILE + TILE // 2)
    return sum(((positions >= start).long() for start in starts), torch.zeros_like(positions))


def _causal_conv(
    device: torch.device,
    batch: int,
    sequence: int,
    channels: int,
    taps: int,
    dtype: str,
    parameter_dtype: str,
) -> Outcome:
    sequence = _limited(sequence, 2 * channels)
    starts = _document_starts(2, sequence).to(device)
    inputs = {
        "x": draw(device, dtype, 2, sequence, channels),
        "weight": draw(device, parameter_dtype, channels, taps),
        "bias": draw(device, parameter_dtype, channels),
    }
    kernel, eager = (partial(f, starts=starts) for f in (causal_conv, reference.causal_conv))
    return _differentiable(kernel, eager, ["output"], **inputs)


def _selective_scan(
    device: torch.device,
    batch: int,
    sequence: int,
    channels: int,
    states: int,
    dtype: str,
    parameter_dtype: str,
) -> Outcome:
    """Compare rows of several chunks, one of them with several documents."""
    sequence = max(1, min(sequence, MOST_STATES // (2 * channels * states)))
    starts = _document_starts(2, sequence).to(device)
    inputs = {
        **{name: draw(device, dtype, 2, sequence, channels) for name in ("x", "dt")},
        "A": -draw(device, "float32", channels, states).exp(),
        **{name: draw(device, dtype, 2, sequence, states) for name in ("B", "C")},
        **{name: draw(device, parameter_dtype, channels) for name in ("D", "dt_bias")},
    }
    kernel, eager = (partial(f, starts=starts) for f in (selective_scan, reference.selective_scan))
    return _differentiable(kernel, eager, ["output"], **inputs)


def _document_starts(batch: int, sequence: int) -> Tensor:
    """Return starts of documents: in the last row of the batch, at its second token and middle."""
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    starts[-1, [1 % sequence, sequence // 2]] = True
    return starts


def _cross_entropy(
    device: torch.device, rows: int, width: int, real: int, ranks: int, dtype: str
) -> Outcome:
    """Compare the statistics, their combination over ranks, and the gradient in place."""
    rows, first = _limited(rows, width), width  # as on the second rank
    logits = draw(device, dtype, rows, width)
    labels = torch.randint(3 * width, (rows,), device=device)
    labels[0] = -100
    scale = torch.rand(rows, device=device) * (labels >= 0)
    triples = torch.rand(max(ranks, 2), 3, rows, device=device)

    def results(
        x: Tensor, triples: Tensor, statistics: Function, combine: Function, gradient: Function
    ) -> Results:
        found, combined = statistics(x, labels, first, real), combine(triples)
        of_logits = gradient(x, labels, found[0], found[1], scale, 0.1 * scale, first, real)
        return {"statistics": found, "combined statistics": combined, "gradient": of_logits}

    exact = results(
        logits.double(),
        triples.double(),
        reference.vocab_statistics,
        reference.combine_statistics,
        reference.vocab_gradient,
    )
    with poisoned():
        actual = results(logits, triples, vocab_statistics, combine_statistics, _gradient_in_place)
    return actual, exact, {}


def _gradient_in_place(logits: Tensor, *rest: Any) -> Tensor:
    vocab_gradient_(logits, *rest)
    return logits


def _limited(rows: int, width: int) -> int:
    return max(1, min(rows, MOST_ELEMENTS // width))


_OPS: dict[str, Callable[..., Outcome]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "causal_conv": _causal_conv,
    "selective_scan": _selective_scan,
}


def check(op: str, device: torch.device, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the worst comparison of a call as JSON values, or the error that it raised."""
    try:
        worst = max(compare(op, device, arguments), key=_badness)
    except Exception as error:  # compilers and drivers have no common class
        text = str(error).strip().splitlines() or [""]
        return {"problem": f"{type(error).__name__}: {text[0]}"}
    finite = worst.error if math.isfinite(worst.error) else None
    return {"tensor": worst.tensor, "error": finite, "tolerance": worst.tolerance}


def is_correct(result: Mapping[str, Any]) -> bool:
    """Return True if a result of `check` is within its tolerance."""
    error = result.get("error")
    return error is not None and error <= result["tolerance"]


def _badness(comparison: Comparison) -> float:
    error = comparison.error
    return error / comparison.tolerance if math.isfinite(error) else math.inf


def main() -> None:
    """Read calls from stdin, compile their kernels, check them, and print a line for each."""
    device, capability = torch.device(sys.argv[1]), int(sys.argv[2])
    calls = json.load(sys.stdin)
    if device.type == "cuda":
        warm_up_in_parallel(calls, capability, len(os.sched_getaffinity(0)))
    torch.zeros(1, device=device).sum().item()
    print(json.dumps({"device": str(device)}), flush=True)
    for op, arguments in calls:
        print(json.dumps(check(op, device, arguments)), flush=True)
        if device.type == "cuda" and not _usable(device):
            sys.exit(DEVICE_LOST)


def _usable(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
