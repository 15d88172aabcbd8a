"""Kernel checks for a GPU, each in a separate process.

    python -m tests.helpers.kernels.gpu_checks attention
    python -m tests.helpers.kernels.gpu_checks calls

The second form prints the calls of the large checks as JSON, for `megagrow_kernels.warm_up`.
`test_gpu.py` starts them, since test processes see no GPU. On a CPU the same checks run in Triton's
interpreter, in fp32, with smaller shapes.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megagrow_kernels import reference
from megagrow_kernels.accuracy import attention_terms
from megagrow_kernels.attention import attention
from megagrow_kernels.causal_conv import causal_conv
from megagrow_kernels.cross_entropy import vocab_gradient_, vocab_statistics
from megagrow_kernels.packing import pack
from megagrow_kernels.rms_norm import add_rms_norm, rms_norm
from megagrow_kernels.rope import rope
from megagrow_kernels.selective_scan import selective_scan
from megagrow_kernels.swiglu import swiglu
from tests.helpers.kernels.accuracy import check, close, draw
from tests.helpers.kernels.kernel_device import Function, KernelDevice
from tests.helpers.kernels.scan_checks import scan_calls, scan_of_logarithms, scans

EPS = 1e-5


def row_cases(setup: KernelDevice) -> list[tuple[int, int]]:
    """Return rows and widths."""
    large = setup.of(16384)
    return [(1, 8), (setup.of(199), 760), (setup.of(2048), 4096), (7, large)]


def rope_cases(setup: KernelDevice) -> list[tuple[int, int, int, int]]:
    """Return tokens, query heads, key heads and head dimensions."""
    return [(setup.of(199), 6, 2, 64), (setup.of(2048), 32, 8, 128)]


def attention_cases(
    setup: KernelDevice,
) -> list[tuple[tuple[int, ...], tuple[int, int, int], dict[str, Any]]]:
    """Return document lengths, (query heads, key/value heads, head dimension), and options."""
    long = setup.of(1024)
    return [
        ((1,), (1, 1, 64), {}),
        ((199,), (4, 1, 64), {}),
        ((long, 1, 127, long), (8, 1, 128), {}),
        ((2 * long,), (4, 2, 128), {"window": setup.of(300)}),
        ((setup.of(1023),), (4, 4, 80), {}),
        ((130, 70), (2, 1, 96), {"scale": 0.2}),
        ((128, 129), (2, 1, 256), {}),
    ]


def loss_cases(setup: KernelDevice) -> list[tuple[int, int]]:
    """Return tokens and vocabulary rows."""
    return [(1, 5), (setup.of(199), 1001), (setup.of(256), setup.of(131072))]


def calls(setup: KernelDevice) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kernel calls of the checks, as `megagrow_kernels.calls.launches` takes them."""
    for dtype in (str(dtype).removeprefix("torch.") for dtype in setup.dtypes):
        for lengths, (heads, groups, head_dim), options in attention_cases(setup):
            sizes = {"batch": 1, "sequence": sum(lengths), "heads": heads, "groups": groups}
            window = options.get("window")
            yield "attention", sizes | {"head_dim": head_dim, "dtype": dtype, "window": window}
        for op in ("rms_norm", "add_rms_norm", "swiglu"):
            for count, width in row_cases(setup):
                yield op, {"rows": count, "width": width, "dtype": dtype}
        for sequence, heads, groups, head_dim in rope_cases(setup):
            sizes = {"batch": 2, "sequence": sequence, "heads": heads, "groups": groups}
            yield "rope", sizes | {"head_dim": head_dim, "dtype": dtype, "table_dtype": "float32"}
        for tokens, width in loss_cases(setup):
            real = width - width // 7
            sizes = {"rows": tokens, "width": width, "real": real, "ranks": 1}
            yield "cross_entropy", sizes | {"dtype": dtype}
        yield from scan_calls(setup, dtype)


def rows(setup: KernelDevice) -> None:
    """Check RMSNorm with and without the addition, RoPE and SwiGLU."""
    for count, width in row_cases(setup):
        x, more, weight = draw(count, width), draw(count, width, seed=1), draw(width, seed=2)
        norm, both = partial(rms_norm, eps=EPS), partial(add_rms_norm, eps=EPS)
        setup.check_accuracy(norm, partial(reference.rms_norm, eps=EPS), [x, weight])
        setup.check_accuracy(both, partial(reference.add_rms_norm, eps=EPS), [x, more, weight])
        setup.check_accuracy(swiglu, reference.swiglu, [x, more])
    for sequence, heads, groups, head_dim in rope_cases(setup):
        q, k = draw(2, sequence, heads, head_dim), draw(2, sequence, groups, head_dim, seed=1)
        positions = torch.arange(sequence, device=setup.device).expand(2, -1)
        angles = 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=setup.device)
        cos, sin = reference.rope_tables(positions, angles)
        setup.check_accuracy(
            partial(rope, cos=cos, sin=sin), partial(_turned, cos=cos, sin=sin), [q, k]
        )


def attention_of_documents(setup: KernelDevice) -> None:
    """Check all head dimensions and groupings, documents of one and of many tokens, and windows."""
    for lengths, (heads, groups, head_dim), options in attention_cases(setup):
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
        packing = pack(ids, *ids.shape).to(setup.device)
        inputs = [
            draw(1, ids.shape[1], count, head_dim, seed=seed)
            for seed, count in enumerate((heads, groups, groups))
        ]
        ids = ids.to(setup.device)
        kernel = partial(attention, packing=packing, **options)
        eager = partial(reference.attention, document_ids=ids, **options)
        terms = partial(attention_terms, document_ids=ids, **options)
        for dtype in setup.dtypes:
            check(setup.run(kernel), setup.run(eager), inputs, dtype, setup.run(terms))
    _attention_against_torch(setup)


def _attention_against_torch(setup: KernelDevice) -> None:
    """Check against torch's attention, without the reference."""
    sequence = setup.of(2048)
    packing = pack(None, 2, sequence).to(setup.device)
    inputs = [draw(2, sequence, heads, 128, seed=i) for i, heads in enumerate((8, 2, 2))]
    kernel, terms = partial(attention, packing=packing), setup.run(attention_terms)
    for dtype in setup.dtypes:
        check(setup.run(kernel), setup.run(_sdpa), inputs, dtype, terms)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def cross_entropy(setup: KernelDevice) -> None:
    """Check statistics and gradient; the last columns are padding."""
    for tokens, width in loss_cases(setup):
        real, first = width - width // 7, 11
        labels = torch.randint(first + real, (tokens,), generator=torch.Generator().manual_seed(0))
        labels[0] = -100
        scale = draw(tokens, seed=1).abs() * (labels >= 0)
        for dtype in setup.dtypes:
            logits = (3 * draw(tokens, width)).to(dtype)
            exact, twin = (
                _loss_by(
                    reference.vocab_statistics, reference.vocab_gradient, x, labels, scale, real
                )
                for x in (logits.double(), logits)
            )
            here = (x.to(setup.device) for x in (logits, labels, scale))
            actual = _loss_by(vocab_statistics, _in_place, *here, real)
            for name, ours, truth, other in zip(
                ("maximum", "total", "target", "gradient"), actual, exact, twin, strict=True
            ):
                parts = (ours.cpu(), truth.double(), other)
                if name != "gradient":
                    parts = tuple(x[:, None] for x in parts)
                close(*parts, name)


def repeated(setup: KernelDevice) -> None:
    """Check that forward and backward are bitwise reproducible."""
    for function, inputs in _calls(
        setup, torch.float32 if setup.device == "cpu" else torch.bfloat16
    ):
        one, two = (_results(function, inputs) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True)), function
        assert all(x.isfinite().all() for x in one), function


def compiled(setup: KernelDevice) -> None:
    """Check that torch.compile, without graph breaks, gives the eager results."""
    backend = "aot_eager" if setup.device == "cpu" else "inductor"
    dtype = torch.float32 if setup.device == "cpu" else torch.bfloat16
    for function, inputs in _calls(setup, dtype):
        plain = _results(function, inputs)
        compiled_function = torch.compile(
            lambda *x, f=function: f(*x), fullgraph=True, backend=backend
        )
        actual = _results(compiled_function, inputs)
        assert all(torch.equal(x, y) for x, y in zip(plain, actual, strict=True)), function


def beyond_32_bits(setup: KernelDevice) -> None:
    """Check tensors with more than 2^31 elements: the last row equals the first computation."""
    count, width = setup.of(2**31 // 4096 + 8), 4096
    x = torch.zeros(count, width, dtype=torch.float16, device=setup.device)
    ends = draw(2, width, dtype=torch.float16).to(setup.device)
    x[[0, -1]] = ends
    weight = draw(width, seed=1, dtype=torch.float16).to(setup.device)
    y = rms_norm(x, weight, EPS)
    assert torch.equal(y[[0, -1]], rms_norm(ends, weight, EPS))
    del y
    assert torch.equal(swiglu(x, x)[[0, -1]], swiglu(ends, ends))
    labels = torch.zeros(count, dtype=torch.int64, device=setup.device)
    statistics = torch.stack(tuple(vocab_statistics(x, labels, 0, width)))
    expected = torch.stack(tuple(vocab_statistics(ends, labels[:2], 0, width)))
    torch.testing.assert_close(statistics[:, [0, -1]], expected)  # of other spans of a row
    ones, zeros = torch.ones_like(statistics[0]), torch.zeros_like(statistics[0])
    vocab_gradient_(x, labels, *statistics[:2], ones, zeros, 0, width)
    of_ends = [part[[0, -1]] for part in (*statistics[:2], ones, zeros)]
    vocab_gradient_(ends, labels[:2], *of_ends, 0, width)
    assert torch.equal(x[[0, -1]], ends)


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.apply_rope(q, cos, sin), reference.apply_rope(k, cos, sin)


def _in_place(logits: Tensor, *rest: Any) -> Tensor:
    vocab_gradient_(logits, *rest)
    return logits


def _loss_by(
    statistics: Function,
    gradient: Function,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    real: int,
) -> list[Tensor]:
    first = 11
    maximum, total, target = statistics(logits, labels, first, real)
    of_logits = gradient(logits, labels, maximum, total, scale, 0.1 * scale, first, real)
    return [maximum, total, target, of_logits]


def _calls(setup: KernelDevice, dtype: torch.dtype) -> Iterator[tuple[Function, list[Tensor]]]:
    """Yield each op with inputs large enough to run many programs concurrently."""

    def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
        drawn = [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
        return [x.to(setup.device).requires_grad_() for x in drawn]

    count, width = setup.of(8192), setup.of(4096)
    yield partial(rms_norm, eps=EPS), inputs((count, width), (width,))
    yield partial(add_rms_norm, eps=EPS), inputs((count, width), (count, width), (width,))
    yield swiglu, inputs((count, width), (count, width))
    sequence = setup.of(2048)
    q, k = (2, sequence, 8, 64), (2, sequence, 2, 64)
    positions = torch.arange(sequence, device=setup.device).expand(2, -1)
    angles = 1e4 ** -torch.linspace(0, 1, 32, device=setup.device)
    cos, sin = (table.to(dtype) for table in reference.rope_tables(positions, angles))
    yield partial(rope, cos=cos, sin=sin), inputs(q, k)
    ids = (torch.arange(sequence) * 3 // sequence).expand(2, -1)
    packing = pack(ids, *ids.shape).to(setup.device)
    yield partial(attention, packing=packing), inputs(q, k, k)
    x, states = (2, sequence, width), (2, sequence, 16)
    yield causal_conv, inputs(x, (width, 4), (width,))
    scan = partial(scan_of_logarithms, selective_scan)
    yield scan, inputs(x, x, (width, 16), states, states, (width,), (width,))


def _results(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [draw(*y.shape, seed=50 + i).to(y) for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


CHECKS: dict[str, Callable[[KernelDevice], None]] = {
    "rows": rows,
    "attention": attention_of_documents,
    "cross-entropy": cross_entropy,
    "scans": scans,
    "repeated": repeated,
    "compiled": compiled,
    "beyond-32-bits": beyond_32_bits,
}


if __name__ == "__main__":
    if sys.argv[1] == "calls":
        print(json.dumps(list(calls(KernelDevice("cuda", 1)))))
    else:
        CHECKS[sys.argv[1]](KernelDevice("cuda", 1))
