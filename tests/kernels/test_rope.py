"""Tests of the rotation of queries and keys against fp64, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.rope import rope, rope_backward, rope_forward
from tests.helpers.kernels.accuracy import check, draw

SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 199, 3, 1, 24),
    (1, 17, 4, 4, 80),
    (2, 33, 5, 2, 128),
]
"""B, S, H, G, D: all ones, sizes that no tile divides, groups of one and more heads."""


def tables(batch: int, sequence: int, width: int) -> tuple[Tensor, Tensor]:
    """Return tables of packed documents: positions restart within rows, and rows differ."""
    positions = torch.arange(sequence).repeat(batch, 1)
    for row in range(batch):
        cut = (7 + 5 * row) % sequence
        positions[row, cut:] -= positions[row, cut].item()
    return reference.rope_tables(positions, 100.0 ** -(torch.arange(width // 2) / (width // 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_turns_queries_and_keys(shape, dtype):
    batch, sequence, heads, groups, width = shape
    cos, sin = tables(batch, sequence, width)
    inputs = [draw(batch, sequence, heads, width), draw(batch, sequence, groups, width, seed=1)]

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return reference.apply_rope(q, cos, sin), reference.apply_rope(k, cos, sin)

    check(lambda q, k: rope(q, k, cos, sin), eager, inputs, dtype)


def test_views_give_the_bits_of_their_copies():
    """q, k and v as parts of one projection; a slice of the batch; heads before the sequence."""
    cos, sin = tables(2, 19, 16)
    fused = draw(4, 19, 6, 16)
    q, k = fused[::2, :, :3], fused[1::2, :, 3:5]
    expected = rope(q.contiguous(), k.contiguous(), cos, sin)
    assert all(map(torch.equal, rope(q, k, cos, sin), expected))
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    assert all(map(torch.equal, rope(q, k, cos, sin), expected))
    q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
    assert q.stride(-1) != 1
    assert all(map(torch.equal, rope(q, k, cos, sin), expected))


def test_one_row_of_tables_serves_the_batch():
    q, k = draw(3, 19, 2, 16), draw(3, 19, 1, 16, seed=1)
    cos, sin = tables(1, 19, 16)
    actual = rope(q, k, cos, sin)
    expected = rope(q, k, cos.repeat(3, 1, 1, 1), sin.repeat(3, 1, 1, 1))
    assert all(map(torch.equal, actual, expected))
    torch.testing.assert_close(actual[0], reference.apply_rope(q, cos, sin))


def test_backward_turns_back():
    q, k = draw(2, 33, 3, 24), draw(2, 33, 1, 24, seed=1)
    cos, sin = tables(2, 33, 24)
    back = rope_backward(*rope_forward(q, k, cos, sin), cos, sin)
    torch.testing.assert_close(back, (q, k), rtol=1e-5, atol=1e-6)
    again = rope_backward(*rope_forward(q, k, cos, sin), cos, sin)
    assert all(map(torch.equal, back, again))


def test_tables_may_be_of_another_type():
    q, k = draw(1, 5, 2, 16), draw(1, 5, 1, 16, seed=1)
    cos, sin = (table.half() for table in tables(1, 5, 16))
    expected = [reference.apply_rope(x, cos.float(), sin.float()) for x in (q, k)]
    torch.testing.assert_close(list(rope(q, k, cos, sin)), expected)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (draw(2, 5, 2, 8).double(), draw(2, 5, 1, 8).double(), "float64"),
        (draw(2, 5, 2, 8), draw(2, 5, 1, 8).half(), "float16"),
        (draw(2, 5, 2, 8), draw(2, 4, 1, 8), r"\(2, 4, 1, 8\)"),
        (draw(2, 6, 2, 8), draw(2, 6, 1, 8), r"\(2, 5, 1, 8\)"),
    ],
)
def test_what_it_cannot_do_is_said(q, k, message):
    with pytest.raises(ValueError, match=message):
        rope(q, k, *tables(2, 5, 8))
