"""Tests of the SwiGLU kernels against fp64, in Triton's interpreter."""

import pytest
import torch

from megagrow_kernels import reference
from megagrow_kernels.swiglu import swiglu, swiglu_backward
from tests.helpers.kernels.accuracy import check, draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (199, 33), (3, 760), (2, 5, 1128)], ids=str)
def test_gates(shape, dtype):
    check(swiglu, reference.swiglu, [draw(*shape), draw(*shape, seed=1)], dtype)


def test_far_from_zero_nothing_overflows():
    gate = torch.tensor([-1e4, -100.0, -50.0, 0.0, 50.0, 100.0, 1e4])
    up = torch.full_like(gate, 3.0)
    torch.testing.assert_close(swiglu(gate, up), reference.swiglu(gate, up))
    dgate, dup = swiglu_backward(torch.ones_like(gate), gate, up)
    expected = torch.tensor([0.0, 0.0, 0.0, 1.5, 3.0, 3.0, 3.0])
    torch.testing.assert_close(dgate, expected)
    torch.testing.assert_close(dup, torch.nn.functional.silu(gate))


def test_strided_inputs_and_gradients():
    """Halves of one projection, and a gradient expanded from one number."""
    fused = draw(7, 48).requires_grad_()
    swiglu(*fused.chunk(2, dim=-1)).sum().backward()
    twin = fused.detach().clone().requires_grad_()
    reference.swiglu(*twin.chunk(2, dim=-1)).sum().backward()
    torch.testing.assert_close(fused.grad, twin.grad)


def test_gradients_repeat_bit_for_bit():
    inputs = [draw(199, 33, seed=seed) for seed in range(3)]
    assert all(map(torch.equal, swiglu_backward(*inputs), swiglu_backward(*inputs)))


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (draw(2, 8).double(), draw(2, 8).double(), "float64"),
        (draw(2, 8), draw(2, 8).half(), "float16"),
        (draw(2, 8), draw(2, 1), r"\(2, 1\)"),
    ],
)
def test_what_it_cannot_do_is_said(gate, up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)
