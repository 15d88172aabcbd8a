"""Tests of the selective scan kernels against fp64, in Triton's interpreter."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megagrow_kernels import reference, selective_scan
from megagrow_kernels.selective_scan import selective_scan_backward, selective_scan_forward
from tests.helpers.kernels.accuracy import check, draw

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
scan = selective_scan.selective_scan


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of 8 tokens, so that short rows have several."""
    monkeypatch.setattr(selective_scan, "CHUNK", 8)


def inputs_of(batch: int, sequence: int, channels: int, states: int) -> list[Tensor]:
    tokens = (batch, sequence)
    shapes = ((*tokens, channels), (*tokens, channels), (channels, states))
    shapes += ((*tokens, states), (*tokens, states), (channels,), (channels,))
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    inputs[2] = -inputs[2].exp()
    return inputs


def starts_at(batch: int, sequence: int, *tokens: int) -> Tensor:
    """Return starts at these tokens of the last row."""
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    starts[-1, list(tokens)] = True
    return starts


def check_scan(inputs: list[Tensor], starts: Tensor, dtype: torch.dtype = torch.float32) -> None:
    kernel, eager = (partial(f, starts=starts) for f in (scan, reference.selective_scan))
    check(kernel, eager, inputs, dtype)


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ((1, 1, 1, 1), (0,)),
        ((2, 5, 3, 4), (1, 4)),
        ((1, 19, 21, 4), (0, 8, 11, 12)),  # blocks of 16 channels; documents of one token
        ((1, 9, 5, 16), (3,)),
        ((2, 17, 4, 1), (8, 16)),
        ((1, 8, 3, 5), ()),
    ],
    ids=str,
)
def test_documents(sizes, tokens):
    check_scan(inputs_of(*sizes), starts_at(*sizes[:2], *tokens))


def test_fp16():
    inputs = inputs_of(1, 11, 6, 4)
    check_scan(inputs, starts_at(1, 11, 3), torch.float16)


def test_without_starts_a_row_is_one_document():
    check(scan, reference.selective_scan, inputs_of(2, 11, 5, 2), torch.float32)


def test_extreme_step_sizes():
    """Steps from exp(-80) to 1e4: the state is kept, or lost at once; nothing overflows."""
    inputs = inputs_of(1, 10, 6, 2)
    inputs[1] = (
        torch.tensor([1e4, 90.0, 20.0, -20.0, -80.0]).repeat(2)[None, :, None].expand(1, 10, 6)
    )
    inputs[6] = torch.zeros(6)
    check_scan(inputs, starts_at(1, 10, 7))


def test_packed_documents_equal_separate_ones_bit_for_bit():
    """Documents that begin with a chunk: the sums within a chunk have the same order."""
    inputs = inputs_of(1, 20, 5, 4)
    packed = scan(*inputs, starts_at(1, 20, 8, 16))
    parts = zip(*(t.split(8, dim=1) if t.dim() == 3 else (t,) * 3 for t in inputs), strict=True)
    assert torch.equal(packed, torch.cat([scan(*part) for part in parts], dim=1))


def test_no_gradient_crosses_a_boundary():
    inputs = [t.requires_grad_() for t in inputs_of(1, 14, 5, 2)]
    y = scan(*inputs, starts_at(1, 14, 9))
    gradients = torch.autograd.grad(y[:, 9:].sum(), [inputs[i] for i in (0, 1, 3)])
    for gradient in gradients:
        assert (gradient[:, :9] == 0).all() and (gradient[:, 9:] != 0).all()


def test_the_state_crosses_chunks():
    """A step size of 0 keeps the state: the last token reads the input of the first."""
    x, dt = torch.zeros(1, 20, 1), torch.full((1, 20, 1), -200.0)
    x[0, 0], dt[0, 0] = 3.0, 50.0
    ones, zero = torch.ones(1, 20, 1), torch.zeros(1)
    y = scan(x, dt, -torch.ones(1, 1), ones, ones, zero, zero)
    torch.testing.assert_close(y, torch.full((1, 20, 1), 150.0))


def test_strided_inputs():
    """Parts of one projection, one row of starts for all rows, and an expanded gradient."""
    fused = draw(2, 9, 16).requires_grad_()
    twin = fused.detach().clone().requires_grad_()
    A, D, dt_bias = -draw(2, 6, seed=1).exp().T, draw(6, seed=2), draw(6, seed=3)
    starts = starts_at(1, 9, 4).expand(2, -1)
    for leaf, function in ((fused, scan), (twin, reference.selective_scan)):
        x, dt, B, C = leaf.split((6, 6, 2, 2), dim=-1)
        function(x, dt, A, B, C, D, dt_bias, starts).sum().backward()
    torch.testing.assert_close(fused.grad, twin.grad)


def test_gradients_repeat_bit_for_bit():
    inputs, starts, dy = inputs_of(1, 19, 21, 4), starts_at(1, 19, 7), draw(1, 19, 21, seed=9)
    _, entering = selective_scan_forward(*inputs, starts)
    first, second = (selective_scan_backward(dy, entering, *inputs, starts) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_parameters_of_another_type_keep_it():
    inputs = [t.half() for t in inputs_of(1, 5, 3, 2)]
    inputs[2] = inputs[2].float()
    leaves = [t.requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(scan(*leaves).sum(), leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": draw(2, 3, 4).double()}, "float64"),
        ({"A": draw(4, 2).double()}, "float64"),
        ({"B": draw(2, 3, 2).half()}, "B is torch.float16"),
        ({"starts": torch.zeros(2, 3)}, "float32"),
        ({"dt": draw(2, 3, 1)}, r"dt \(2, 3, 4\), got \(2, 3, 1\)"),
        ({"C": draw(2, 3, 5)}, r"C \(2, 3, 2\), got \(2, 3, 5\)"),
        ({"dt_bias": draw(3)}, r"dt_bias \(4,\), got \(3,\)"),
    ],
)
def test_invalid_inputs_are_refused(changes, message):
    inputs = dict(zip(NAMES, inputs_of(2, 3, 4, 2), strict=True))
    with pytest.raises(ValueError, match=message):
        scan(**inputs | changes)


def test_states_larger_than_the_tables_are_refused():
    with pytest.raises(LookupError, match="states=65"):
        scan(*inputs_of(1, 1, 1, 65))
