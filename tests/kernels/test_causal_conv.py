"""Tests of the causal convolution kernels against fp64, in Triton's interpreter."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.causal_conv import causal_conv, causal_conv_backward
from tests.helpers.kernels.accuracy import check, draw


def inputs_of(batch: int, sequence: int, channels: int, taps: int) -> list[Tensor]:
    return [draw(batch, sequence, channels), draw(channels, taps, seed=1), draw(channels, seed=2)]


def starts_at(batch: int, sequence: int, *tokens: int) -> Tensor:
    """Return starts at these tokens of the last row."""
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    starts[-1, list(tokens)] = True
    return starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ((1, 1, 1, 4), (0,)),
        ((1, 2, 3, 4), ()),  # shorter than the taps
        ((2, 21, 19, 4), (0, 1, 8, 9, 19)),  # blocks of 8 tokens and 16 channels
        ((1, 9, 5, 1), (3,)),
        ((2, 10, 6, 3), (2, 9)),
    ],
    ids=str,
)
def test_documents(sizes, tokens, dtype):
    starts = starts_at(*sizes[:2], *tokens)
    kernel, eager = (partial(f, starts=starts) for f in (causal_conv, reference.causal_conv))
    check(kernel, eager, inputs_of(*sizes), dtype)


def test_without_starts_a_row_is_one_document():
    check(causal_conv, reference.causal_conv, inputs_of(2, 9, 5, 4), torch.float32)


def test_packed_documents_equal_separate_ones_bit_for_bit():
    x, weight, bias = inputs_of(1, 11, 5, 4)
    packed = causal_conv(x, weight, bias, starts_at(1, 11, 2, 5))
    alone = [causal_conv(part, weight, bias) for part in x.split((2, 3, 6), dim=1)]
    assert torch.equal(packed, torch.cat(alone, dim=1))


def test_no_gradient_crosses_a_boundary():
    x, weight, bias = inputs_of(1, 9, 5, 4)
    y = causal_conv(x.requires_grad_(), weight, bias, starts_at(1, 9, 4))
    (gradient,) = torch.autograd.grad(y[:, 4:].sum(), x)
    assert (gradient[:, :4] == 0).all() and (gradient[:, 4:] != 0).all()


def test_half_of_a_projection_and_an_expanded_gradient():
    fused = draw(2, 9, 12).requires_grad_()
    _, weight, bias = inputs_of(2, 9, 6, 4)
    causal_conv(fused.chunk(2, dim=-1)[0], weight, bias).sum().backward()
    twin = fused.detach().clone().requires_grad_()
    reference.causal_conv(twin.chunk(2, dim=-1)[0], weight, bias).sum().backward()
    torch.testing.assert_close(fused.grad, twin.grad)


def test_far_from_zero_nothing_overflows():
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).reshape(5, 1, 1)
    weight, bias = torch.ones(1, 1), torch.zeros(1)
    starts = torch.zeros(5, 1, dtype=torch.bool)
    torch.testing.assert_close(causal_conv(x, weight, bias)[:, 0, 0], x.relu()[:, 0, 0])
    dx, _, _ = causal_conv_backward(torch.ones_like(x), x, weight, bias, starts)
    torch.testing.assert_close(dx.flatten(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_gradients_repeat_bit_for_bit():
    x, weight, bias = inputs_of(2, 21, 19, 4)
    arguments = (draw(2, 21, 19, seed=3), x, weight, bias, starts_at(2, 21, 7))
    first, second = (causal_conv_backward(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": draw(2, 3, 4).double()}, "float64"),
        ({"weight": draw(4, 2).double()}, "float64"),
        ({"starts": torch.zeros(2, 3)}, "float32"),
        ({"bias": draw(5)}, r"\(5,\)"),
        ({"starts": torch.zeros(3, 2, dtype=torch.bool)}, r"\(3, 2\)"),
    ],
)
def test_invalid_inputs_are_refused(changes, message):
    inputs = {"x": draw(2, 3, 4), "weight": draw(4, 2), "bias": draw(4)}
    with pytest.raises(ValueError, match=message):
        causal_conv(**inputs | changes)
