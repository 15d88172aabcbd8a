"""Tests of the references against independent definitions, and of the model's ops against them."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama as theirs

from megagrow.model import attention_ops, ops
from megagrow_kernels import reference
from tests.helpers.hugging_face import hugging_face, tiny

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documents() -> torch.Tensor:
    """Return two rows of 12 tokens with documents of different lengths, one of a single token."""
    first = torch.tensor([0] * 5 + [1] * 1 + [2] * 6)
    return torch.stack((first, torch.tensor([7] * 12)))


@pytest.mark.parametrize("implementation", [reference.rms_norm, ops.rms_norm])
def test_rms_norm(implementation):
    norm = theirs.LlamaRMSNorm(24, eps=1e-2)
    norm.weight.data = draw(24, seed=1)
    x = draw(2, 5, 24)
    torch.testing.assert_close(implementation(x, norm.weight, 1e-2), norm(x), **CLOSE)


def test_rms_norm_of_bf16_squares_in_fp32():
    x = (draw(3, 64) * 1e15).bfloat16()
    expected = F.rms_norm(x.double(), (64,), eps=1e-5)
    actual = reference.rms_norm(x, torch.ones(64), 1e-5)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=0, atol=0)


def test_rope():
    config = tiny(num_key_value_heads=2)
    positions = torch.tensor([[0, 1, 2, 3, 17, 63], [5, 6, 0, 1, 2, 3]])
    q, k = draw(2, 6, 4, 8), draw(2, 6, 2, 8, seed=1)
    cos, sin = hugging_face(config).model.rotary_emb(q, positions)
    expected = theirs.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    tables = reference.rope_tables(positions, config.rope_theta ** -(torch.arange(4.0) / 4))
    for x, rotated in zip((q, k), expected, strict=True):
        actual = reference.apply_rope(x, *tables)
        torch.testing.assert_close(actual, rotated, **CLOSE)
    assert tables[0].shape == (2, 6, 1, 8)


def test_rope_turns_by_relative_positions_only():
    q, k = draw(1, 1, 1, 8, seed=3), draw(1, 1, 1, 8, seed=4)

    frequencies = 100.0 ** -(torch.arange(4.0) / 4)

    def score(at: int, other: int) -> torch.Tensor:
        turned = [
            reference.apply_rope(x, *reference.rope_tables(torch.tensor([[position]]), frequencies))
            for x, position in ((q, at), (k, other))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(40, 38), **CLOSE)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_swiglu():
    gate, up = draw(3, 7), draw(3, 7, seed=1)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(reference.swiglu(gate, up), expected, **CLOSE)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_causal_attention(groups):
    q, k, v = draw(2, 12, 4, 8), draw(2, 12, groups, 8, seed=1), draw(2, 12, groups, 8, seed=2)
    repeated = [x.repeat_interleave(4 // groups, dim=2).transpose(1, 2) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, is_causal=True)
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(reference.attention(q, k, v), expected, **CLOSE)
    torch.testing.assert_close(attention_ops.sdpa(q, k, v, None), expected, **CLOSE)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_of_packed_documents_is_attention_of_each(groups):
    q, k, v = draw(2, 12, 4, 8), draw(2, 12, groups, 8, seed=1), draw(2, 12, groups, 8, seed=2)
    ids = documents()
    full = reference.attention(q, k, v, ids)
    for row in range(2):
        for document in ids[row].unique():
            where = (ids[row] == document).nonzero()[:, 0]
            one = [x[row : row + 1, where] for x in (q, k, v)]
            expected = reference.attention(*one)[0]
            torch.testing.assert_close(full[row][where], expected, **CLOSE)
    fused = attention_ops.sdpa(q, k, v, reference.attention_mask(ids))
    torch.testing.assert_close(fused, full, **CLOSE)


def test_gradients_of_the_ops_are_those_of_the_references():
    inputs = [draw(2, 12, 4, 8), draw(2, 12, 2, 8, seed=1), draw(2, 12, 2, 8, seed=2)]
    mask = reference.attention_mask(documents())
    calls = (
        lambda q, k, v: attention_ops.sdpa(q, k, v, mask),
        lambda q, k, v: reference.attention(q, k, v, documents()),
    )
    gradients = []
    for call in calls:
        leaves = [x.clone().requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad((call(*leaves) * inputs[0]).sum(), leaves))
    for fused, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain, **CLOSE)


def test_vocab_statistics_of_all_ranks_make_the_cross_entropy():
    logits, labels = draw(9, 12) * 5, torch.randint(12, (9,))
    parts = [
        reference.vocab_statistics(logits[:, first : first + 4], labels, first, 4)
        for first in (0, 4, 8)
    ]
    maximum = torch.stack([part[0] for part in parts]).amax(0)
    total = sum(part[1] * (part[0] - maximum).exp() for part in parts)
    target = sum(part[2] for part in parts)
    expected = -logits.log_softmax(-1)[torch.arange(9), labels]
    torch.testing.assert_close(total.log() + maximum - target, expected, **CLOSE)
    for part, first in zip(parts, (0, 4, 8), strict=True):
        assert (part[2][(labels < first) | (labels >= first + 4)] == 0).all()


def starts_of(ids: torch.Tensor) -> torch.Tensor:
    """Return True at the first token of each document but the first of a row."""
    return ids.diff(dim=1, prepend=ids[:, :1]) != 0


def test_causal_conv_is_a_convolution_of_each_document():
    x, weight, bias = (draw(*shape).double() for shape in ((2, 12, 6), (6, 4), (6,)))
    ids = documents()
    packed = reference.causal_conv(x, weight, bias, starts_of(ids))
    for row in range(2):
        for document in ids[row].unique():
            one = x[row, ids[row] == document]
            expected = F.conv1d(one.T, weight[:, None], bias, padding=3, groups=6)
            expected = F.silu(expected[:, : len(one)]).T
            actual = packed[row, ids[row] == document]
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
            alone = reference.causal_conv(one[None], weight, bias)[0]
            torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-13)


def scan_inputs(dt: torch.Tensor) -> list[torch.Tensor]:
    """Return fp64 inputs of a scan of 12 tokens, 3 channels and states of 5 numbers."""
    shapes = ((3, 5), (2, 12, 5), (2, 12, 5), (3,), (3,))
    A, *others = (draw(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return [x.double() for x in (draw(2, 12, 3, seed=9), dt, -A.exp(), *others)]


@pytest.mark.parametrize("packed", [False, True])
def test_selective_scan_is_the_product_with_a_triangular_matrix(packed):
    """The matrix form of the recurrence: Dao and Gu 2024, equation 3."""
    x, dt, A, B, C, D, dt_bias = inputs = scan_inputs(draw(2, 12, 3, seed=8))
    ids = documents() if packed else None
    actual = reference.selective_scan(*inputs, None if ids is None else starts_of(ids))
    delta = F.softplus(dt + dt_bias)
    total = delta.cumsum(1)
    exponents = (total[:, :, None] - total[:, None])[..., None] * A
    mask = reference.attention_mask(torch.zeros(2, 12) if ids is None else ids)[:, 0, :, :, None]
    matrix = torch.einsum("btn,btscn,bsn->btsc", C, exponents.exp(), B) * mask
    expected = torch.einsum("btsc,bsc->btc", matrix, delta * x) + D * x
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_selective_scan_of_extreme_steps():
    """softplus is the identity far above 0, and the exponential far below."""
    dt = torch.tensor([800.0, 30.0, -30.0, -600.0]).repeat(3).reshape(1, 12, 1).expand(2, 12, 3)
    x, _, _, B, C, *skips = inputs = scan_inputs(dt.double().clone().requires_grad_())
    dt = inputs[1]
    for zero in skips:  # D and dt_bias
        zero.zero_()
    y = reference.selective_scan(*inputs, torch.ones(2, 12, dtype=torch.bool))
    exact = torch.where(dt > 0, dt + dt.neg().exp(), dt.exp())
    expected = (C * B).sum(-1, keepdim=True) * x * exact
    torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), dt)
    slope = torch.where(dt > 0, 1 / (1 + dt.neg().exp()), dt.exp())
    expected = (C * B).sum(-1, keepdim=True) * x * slope
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=0)
