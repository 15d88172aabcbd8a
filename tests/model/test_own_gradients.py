"""Written-out gradients against those that autograd derives from the references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.model.own_gradients import rms_norm, rope
from megagrow_kernels import reference

EPS = 1e-2


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(call: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Outputs and input gradients, for gradients of the outputs in the order of an attention."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [draw(*x.transpose(1, 2).shape, dtype=x.dtype).transpose(1, 2) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.apply_rope(q, cos, sin), reference.apply_rope(k, cos, sin)


def tables() -> tuple[Tensor, Tensor]:
    positions = torch.arange(12).expand(2, -1) * 5
    return reference.rope_tables(positions, 100.0 ** -(torch.arange(8.0) / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_those_of_the_reference_to_the_bit(dtype: torch.dtype) -> None:
    q, k = draw(2, 12, 4, 16, dtype=dtype), draw(2, 12, 2, 16, seed=1, dtype=dtype)
    cos, sin = (table.to(dtype) for table in tables())
    found = outcome(lambda q, k: rope(q, k, cos, sin), q, k)
    expected = outcome(lambda q, k: plain_rope(q, k, cos, sin), q, k)
    exact = 4 if dtype == torch.float32 else 2  # autograd rounds the two products of a gradient
    assert all(torch.equal(*pair) for pair in list(zip(found, expected, strict=True))[:exact])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_rotations_under_autocast_keep_the_dtype_of_their_input() -> None:
    q, k = (draw(2, 12, 4, 16, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    found = outcome(lambda q, k: rope(q, k, *tables()), q, k)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    expected = outcome(lambda q, k: plain_rope(q, k, *tables()), q, k)
    for one, other in zip(found, expected, strict=True):
        # Autograd rounds the two products of a gradient before it adds them.
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_reference(dtype: torch.dtype) -> None:
    x, weight = draw(3, 5, 24, dtype=dtype), draw(24, seed=1, dtype=dtype)
    found = outcome(lambda x, w: rms_norm(x, w, EPS), x, weight)
    expected = outcome(lambda x, w: reference.rms_norm(x, w, EPS), x, weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
