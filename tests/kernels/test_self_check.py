"""Self-check of the kernels: correct ones pass, broken ones are found, in the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from megagrow.train import kernel_check
from megagrow.train.kernel_calls import OPERATION_OF
from megagrow_kernels import calls, self_check, swiglu
from megagrow_kernels.accuracy import TOLERANCE
from megagrow_kernels.attention import attention
from megagrow_kernels.packing import Packing
from megagrow_kernels.self_check import check

CPU = torch.device("cpu")
HEADS = {"batch": 2, "sequence": 260, "heads": 2, "groups": 1, "head_dim": 16}
NORM = {"rows": 40, "width": 72, "dtype": "float16"}
SWIGLU = {"rows": 8, "width": 64, "dtype": "float32"}
SEQUENCE = {"batch": 2, "sequence": 9, "channels": 12, "dtype": "float16"}
SEQUENCE |= {"parameter_dtype": "float32"}
CALLS: dict[str, dict[str, Any]] = {
    "rms_norm": NORM | {"dtype": "float32"},
    "add_rms_norm": NORM,
    "rope": HEADS | {"sequence": 20, "dtype": "float16", "table_dtype": "float32"},
    "swiglu": SWIGLU,
    "attention": HEADS | {"dtype": "float32"},
    "causal_conv": SEQUENCE | {"taps": 4},
    "selective_scan": SEQUENCE | {"states": 3},
    "cross_entropy": {"rows": 24, "width": 200, "real": 190, "ranks": 2, "dtype": "float32"},
}


@pytest.mark.parametrize("op", CALLS)
def test_the_kernels_pass(op: str) -> None:
    result = check(op, CPU, CALLS[op])
    assert 0 < result["error"] <= result["tolerance"], result


def test_a_window_hides_keys_of_the_limited_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the queries remain a quarter of the tokens."""
    called = []

    def kernel(*inputs: torch.Tensor, packing: Packing, window: int | None) -> torch.Tensor:
        called.append((window, inputs[0].shape[1]))
        return attention(*inputs, packing, window=window)

    monkeypatch.setattr(self_check, "attention", kernel)
    for window, queries in ((None, None), (5, 65), (4096, None)):
        options = {"window": window, "queries": queries}
        result = check("attention", CPU, CALLS["attention"] | options)
        assert 0 < result["error"] <= result["tolerance"], result
    assert called == [(None, 260), (5, 65), (130, 260)]


def test_every_op_has_a_check() -> None:
    assert self_check._OPS.keys() == calls._OPS.keys() == OPERATION_OF.keys() == CALLS.keys()
    assert kernel_check.DEVICE_LOST == self_check.DEVICE_LOST


@triton.jit
def _last_element_missing(gate, up, out, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + offsets, offsets < count, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, offsets < count, other=0.0).to(tl.float32)
    tl.store(out + offsets, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), offsets < count - 1)


@triton.jit
def _without_the_second_term(dout, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    d = tl.load(dout + offsets, mask, other=0.0).to(tl.float32)
    g = tl.load(gate + offsets, mask, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask, other=0.0).to(tl.float32)
    tl.store(dup + offsets, (d * g * tl.sigmoid(g)).to(dup.dtype.element_ty), mask)
    tl.store(dgate + offsets, (d * u * tl.sigmoid(g)).to(dgate.dtype.element_ty), mask)


def test_broken_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(swiglu, "_forward_kernel", _last_element_missing)
        result = check("swiglu", CPU, SWIGLU)
    assert (result["tensor"], result["error"]) == ("output", None), "NaN where nothing was written"
    with monkeypatch.context() as patch:
        patch.setattr(swiglu, "_backward_kernel", _without_the_second_term)
        result = check("swiglu", CPU, SWIGLU)
    assert result["tensor"] == "gradient of gate" and result["error"] > 0.1


def _zeroing(index: int, where: slice) -> Callable[..., Any]:
    """Wrap attention: one gradient is zero in some rows of every sequence."""
    original = self_check.attention

    def zero(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[:, where] = 0
        return gradient

    def broken(*inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        views = [x.view_as(x) for x in inputs]
        views[index].register_hook(zero)
        return original(*views, **options)

    return broken


@pytest.mark.parametrize(("index", "name"), enumerate(("q", "k", "v")))
def test_a_few_missing_rows_are_found(
    monkeypatch: pytest.MonkeyPatch, index: int, name: str
) -> None:
    monkeypatch.setattr(self_check, "attention", _zeroing(index, slice(-8, None)))
    result = check("attention", CPU, CALLS["attention"] | {"sequence": 132})
    assert result["tensor"] == f"gradient of {name}"
    assert result["error"] > 5 * TOLERANCE[torch.bfloat16]


def test_an_exception_is_a_problem() -> None:
    wrong = check("swiglu", CPU, SWIGLU | {"dtype": "int8"})
    assert wrong.keys() == {"problem"} and wrong["problem"].startswith("RuntimeError: ")
