"""Tests of functions that are recomputed in the backward pass."""

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor

from megagrow.model.layers.recompute import Recomputed


def gated(calls: list[Tensor], gate: Tensor, up: Tensor) -> Tensor:
    out = torch.nn.functional.silu(gate) * up
    calls.append(weakref.ref(out))
    return out


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 5), (6, 5), (5, 3), (5, 3))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("inside", [False, True], ids=["output", "output and saved tensors"])
def test_two_reads_share_one_recomputation(inside: bool) -> None:
    gate, up, one, other = leaves = inputs()
    out = gated([], gate, up)
    expected = torch.autograd.grad(
        (out @ one).sin().sum() + (out.view(3, 2, 5) @ other).sum(), leaves
    )

    calls: list = []
    again = Recomputed(partial(gated, calls), gate, up)
    out = again.run() if inside else gated(calls, gate, up)
    with again.reads(out):
        result = (out @ one).sin().sum() + (out.view(3, 2, 5) @ other).sum()
    del out
    assert calls[0]() is None, "the output was kept"
    for actual, gradient in zip(torch.autograd.grad(result, leaves), expected, strict=True):
        assert torch.equal(actual, gradient)
    assert len(calls) == 2 and calls[1]() is None


def test_what_shares_no_memory_with_the_output_is_kept() -> None:
    gate, up, one, _ = inputs()
    calls: list = []
    again = Recomputed(partial(gated, calls), gate, up)
    with again.reads(gated(calls, gate, up)):
        (gate @ one).square().sum().backward()
    assert len(calls) == 1
