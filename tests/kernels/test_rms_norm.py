"""Tests of the RMSNorm kernels against fp64, with and without residual, in the interpreter."""

import pytest
import torch
from torch import Tensor

from megagrow_kernels import launching, reference
from megagrow_kernels.rms_norm import PROGRAMS_EACH, add_rms_norm, rms_norm, rms_norm_backward
from megagrow_kernels.tiles import select
from tests.helpers.kernels.accuracy import check, draw

EPS = 1e-5
SHAPES = [(1, 8), (1, 760), (199, 24), (199, 1128), (37, 760), (2, 5, 96), (3, 4100)]
DTYPES = [torch.float32, torch.float16]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, residual, weight, EPS)


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    return reference.rms_norm(x, weight, EPS)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return reference.add_rms_norm(x, residual, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone(shape, dtype):
    check(norm, eager_norm, [draw(*shape), draw(shape[-1], seed=1)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_a_residual(shape, dtype):
    inputs = [draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2)]
    check(add_norm, eager_add_norm, inputs, dtype)


def test_one_of_the_two_results_may_stay_unused():
    x, residual, weight = inputs = [draw(5, 24), draw(5, 24, seed=1), draw(24, seed=2)]
    check(
        lambda *given: add_norm(*given)[0],
        lambda *given: eager_add_norm(*given)[0],
        inputs,
        torch.float32,
    )
    leaves = [t.requires_grad_() for t in inputs]
    add_norm(x, residual, weight)[1].backward(draw(5, 24, seed=3))
    assert weight.grad is None
    assert all(torch.equal(t.grad, draw(5, 24, seed=3)) for t in leaves[:2])


def test_of_rows_that_are_zero_or_huge():
    x = torch.stack((torch.zeros(64), draw(64) * 1e15))
    expected = eager_norm(x.double(), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(norm(x, torch.ones(64)).double(), expected, rtol=1e-6, atol=0)


def test_strided_inputs_and_gradients():
    x, weight = draw(24, 10).T, draw(24)
    leaf = x.detach().requires_grad_()
    norm(leaf, weight).sum().backward()  # an expanded gradient, its strides 0
    twin = x.contiguous().requires_grad_()
    eager_norm(twin, weight).sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 199, 4096])
def test_the_weights_gradient_is_as_good_as_its_sum_can_be(rows):
    """The error of the weight gradient stays within that of its fp32 sums.

    The terms dy n are close to N(0, 1), each computed to about 4 u (u = 2^-24): over M rows that is
    a random walk of 4 u sqrt(M). In one of A partial sums of L = M / A terms, the sum of l terms is
    about sqrt(l) and is rounded by up to u sqrt(l), over all l another walk, of u L / sqrt(2); over
    all A sums u sqrt(M) sqrt(L / 2). Of 64 columns, none deviates 6 times as far.
    """
    x, dy, weight = draw(rows, 64), draw(rows, 64, seed=1), draw(64, seed=2)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(eager_norm(*wide), wide, dy.double())[1]
    inverse_rms = torch.rsqrt(x.square().mean(-1) + EPS)
    actual = rms_norm_backward(dy, None, x, weight, inverse_rms)[1]
    tile = select("rms_norm_backward", launching.INTERPRETER, width=64, bytes=4)
    sums = PROGRAMS_EACH * launching.INTERPRETER_PROGRAMS * tile["ROWS"]
    error = 6 * 2**-24 * rows**0.5 * (4 + (max(rows / sums, 1) / 2) ** 0.5)
    assert (actual.double() - exact).abs().max() <= error


def test_gradients_repeat_bit_for_bit():
    x, dy, weight = draw(199, 760), draw(199, 760, seed=1), draw(760, seed=2)
    inverse_rms = torch.rsqrt(x.square().mean(-1) + EPS)
    first, second = (rms_norm_backward(dy, x, x, weight, inverse_rms) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_weight_may_be_away_between_forward_and_backward():
    """ZeRO-3 frees the parameter's memory after the forward pass and refills it.

    The test refills it with different numbers, which shows that the parameter itself was saved.
    """
    x, weight = draw(7, 24).requires_grad_(), torch.nn.Parameter(draw(24, seed=1))
    for call in (norm, lambda x, w: add_norm(x, x.detach(), w)[0]):
        expected = torch.autograd.grad(call(x, weight).sum(), x)[0]
        y = call(x, weight)
        kept, weight.data = weight.data, torch.empty(0)
        weight.data = 2 * kept
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * expected)
        weight.data = kept


def test_a_weight_of_another_type_keeps_it():
    x, weight = draw(5, 24, dtype=torch.float16), draw(24, seed=1).requires_grad_()
    y = norm(x, weight)
    torch.testing.assert_close(y, eager_norm(x, weight), rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    (expected,) = torch.autograd.grad(eager_norm(x, weight), weight, torch.ones_like(y))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (draw(2, 8).double(), draw(8), "float64"),
        (draw(2, 8), draw(8).double(), "float64"),
        (draw(2, 8), draw(9), "weight"),
        (draw(2, 16385), draw(16385), "width=16385"),
    ],
)
def test_what_it_cannot_do_is_said(x, weight, message):
    with pytest.raises((ValueError, LookupError), match=message):
        norm(x, weight)


def test_inputs_of_two_shapes_or_types_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 8\), \(3, 8\)"):
        add_norm(draw(2, 8), draw(3, 8), draw(8))
    with pytest.raises(ValueError, match="float16"):
        add_norm(draw(2, 8), draw(2, 8).half(), draw(8))
