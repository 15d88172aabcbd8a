"""Tests of kernels as torch ops: registration, compilation, checkpointing.

Attention and the cross-entropy have their own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megagrow_kernels import reference
from megagrow_kernels.causal_conv import causal_conv
from megagrow_kernels.rms_norm import add_rms_norm, rms_norm
from megagrow_kernels.rope import rope
from megagrow_kernels.selective_scan import selective_scan
from megagrow_kernels.swiglu import swiglu
from tests.helpers.kernels.accuracy import draw, with_gradients

TABLES = reference.rope_tables(torch.arange(5)[None], torch.tensor([1.0, 0.5, 0.25, 0.125]))
HEADS = [draw(1, 5, 2, 8), draw(1, 5, 1, 8, seed=1)]
ROWS = [draw(5, 24, seed=seed) for seed in range(3)]
WEIGHT, INVERSE_RMS = draw(24, seed=3), draw(5, seed=4).abs()
TOKENS = [draw(1, 5, 6, seed=seed) for seed in range(3)]
CONV = [TOKENS[0], draw(6, 3, seed=4), draw(6, seed=5)]
STATES = [draw(1, 5, 2, seed=seed) for seed in (6, 7)]
SCAN = [*TOKENS[:2], -draw(6, 2, seed=8).exp(), *STATES, draw(6, seed=9), draw(6, seed=10)]
STARTS = torch.tensor([[False, False, True, False, False]])

CALLS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-5), [ROWS[0], WEIGHT]),
    "add_rms_norm": (lambda x, r, weight: add_rms_norm(x, r, weight, 1e-5), [*ROWS[:2], WEIGHT]),
    "rope": (lambda q, k: rope(q, k, *TABLES), HEADS),
    "swiglu": (swiglu, ROWS[:2]),
    "causal_conv": (causal_conv, CONV),
    "selective_scan": (selective_scan, SCAN),
}
OPS: dict[str, tuple[Any, ...]] = {
    "rms_norm": (ROWS[0], WEIGHT, 1e-5),
    "add_rms_norm": (*ROWS[:2], WEIGHT, 1e-5),
    "rms_norm_backward": (*ROWS, WEIGHT, INVERSE_RMS),
    "rope": (*HEADS, *TABLES),
    "rope_backward": (*HEADS, *TABLES),
    "swiglu": (*ROWS[:2],),
    "swiglu_backward": (*ROWS,),
    "causal_conv": (*CONV, STARTS),
    "causal_conv_backward": (TOKENS[1], *CONV, STARTS),
    "selective_scan": (*SCAN, STARTS),
    "selective_scan_backward": (TOKENS[2], torch.zeros(1, 1, 2, 6), *SCAN, STARTS),
}
DIFFERENTIABLE = {"rms_norm": 2, "add_rms_norm": 3, "rope": 2, "swiglu": 2}
DIFFERENTIABLE |= {"causal_conv": 3, "selective_scan": 7}
"""Number of leading arguments of an op that get gradients."""


@pytest.mark.parametrize("name", OPS)
def test_op_is_registered_as_torch_wants_it(name):
    count = DIFFERENTIABLE.get(name, 0)
    given = [x.clone().requires_grad_() for x in OPS[name][:count]]
    torch.library.opcheck(getattr(torch.ops.megagrow, name), (*given, *OPS[name][count:]))


def test_backward_of_the_norm_without_a_sum_is_registered():
    arguments = (ROWS[0], None, ROWS[1], WEIGHT, INVERSE_RMS)
    torch.library.opcheck(torch.ops.megagrow.rms_norm_backward, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name):
    call, inputs = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    actual = with_gradients(compiled, inputs, torch.float32)
    expected = with_gradients(call, inputs, torch.float32)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", CALLS)
def test_may_be_computed_again_for_the_backward_pass(name):
    call, inputs = CALLS[name]

    def again(*given: Tensor) -> Any:
        return checkpoint(call, *given, use_reentrant=False)

    actual = with_gradients(again, inputs, torch.float32)
    expected = with_gradients(call, inputs, torch.float32)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", CALLS)
def test_bf16_is_refused_in_the_interpreter(name):
    call, inputs = CALLS[name]
    with pytest.raises(RuntimeError, match="bf16"):
        call(*(x.bfloat16() for x in inputs))


class Recorder(TorchDispatchMode):
    """Record the names of the ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "megagrow":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_modes_see_a_named_op_and_eager_calls_do_without(name, monkeypatch):
    """Both give the same bits. Selective activation checkpointing needs the names."""
    call, inputs = CALLS[name]
    with Recorder() as recorder:
        named = with_gradients(call, inputs, torch.float32)
    backward = f"{name.removeprefix('add_')}_backward"
    assert recorder.names == [name, backward]
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)  # no registered op is called
    eager = with_gradients(call, inputs, torch.float32)
    assert all(map(torch.equal, named, eager))


def test_fake_and_meta_tensors_launch_nothing(monkeypatch):
    monkeypatch.setattr("megagrow_kernels.swiglu.launch", None)
    gate = torch.empty(5, 24, device="meta", requires_grad=True)
    swiglu(gate, gate).sum().backward()
    with FakeTensorMode() as mode:
        gate = torch.empty(5, 24, requires_grad=True)
    swiglu(gate, gate).sum().backward()  # outside of the mode
    assert gate.grad.fake_mode is mode


def test_second_derivatives_are_refused():
    gate = ROWS[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu(gate, gate).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match=r"megagrow\.swiglu_backward"):
        gradient.sum().backward()
