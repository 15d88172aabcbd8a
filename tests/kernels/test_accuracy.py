"""Tests of the accuracy criterion: rounding in bf16 passes, and small faults do not.

The interpreter cannot compute in bf16, so bf16 kernels are modelled in torch.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.accuracy import attention_terms, relative_rmse, segment_error
from tests.helpers.kernels.accuracy import close, draw, upstream_of, with_gradients
from tests.helpers.kernels.documents import ids_of

BF16 = torch.bfloat16
IDS = ids_of(((256, 1, 127, 128),))
HEADS = [draw(1, 512, heads, 64, seed=heads).to(BF16) for heads in (4, 2, 2)]
LAST = 255
"""Last token of the longest document: few queries see its key."""

Results = list[tuple[Tensor, Tensor | None]]
"""Exact results, and the terms of those in which terms cancel."""


def attention_results() -> Results:
    exact = with_gradients(lambda *x: reference.attention(*x, IDS), HEADS, torch.float64)
    upstream = upstream_of(exact[:1], BF16)[0].double()
    terms = attention_terms(*(x.double() for x in HEADS), upstream, IDS)
    return list(zip(exact, (None, *terms), strict=True))


def norm_results() -> Results:
    inputs = [draw(70, 200).to(BF16), draw(70, 200, seed=1).to(BF16), draw(200, seed=2).to(BF16)]

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.add_rms_norm(x, residual, weight, 1e-5)

    return [(x, None) for x in with_gradients(norm, inputs, torch.float64)]


def rope_results() -> Results:
    cos, sin = reference.rope_tables(torch.arange(70)[None], torch.linspace(1, 0.1, 32))
    inputs = [draw(1, 70, 3, 64).to(BF16)]
    exact = with_gradients(lambda x: reference.apply_rope(x, cos, sin), inputs, torch.float64)
    return [(x, None) for x in exact]


def swiglu_results() -> Results:
    inputs = [draw(70, 200, seed=seed).to(BF16) for seed in range(2)]
    return [(x, None) for x in with_gradients(reference.swiglu, inputs, torch.float64)]


def conv_results() -> Results:
    inputs = [draw(1, 70, 200).to(BF16), draw(200, 4, seed=1).to(BF16), draw(200, seed=2).to(BF16)]
    starts = (torch.arange(70) % 30 == 7)[None]
    exact = with_gradients(lambda *x: reference.causal_conv(*x, starts), inputs, torch.float64)
    return [(_rows(x), None) for x in exact]


def scan_results() -> Results:
    shapes = ((1, 70, 48), (1, 70, 48), (48, 16), (1, 70, 16), (1, 70, 16), (48,), (48,))
    inputs = [draw(*shape, seed=seed).to(BF16) for seed, shape in enumerate(shapes)]
    inputs[2] = -inputs[2].exp()
    starts = (torch.arange(70) % 30 == 7)[None]
    exact = with_gradients(lambda *x: reference.selective_scan(*x, starts), inputs, torch.float64)
    return [(_rows(x), None) for x in exact]


def _rows(x: Tensor) -> Tensor:
    """Return a tensor (1, S, C) as (S, C)."""
    return x[0] if x.dim() == 3 else x


def loss_results() -> Results:
    logits, labels = 3 * draw(70, 1000, dtype=torch.float64), torch.arange(70)
    statistics = reference.vocab_statistics(logits, labels, 0, 1000)
    scale = torch.full((70,), 1 / 70, dtype=torch.float64)
    gradient = reference.vocab_gradient(
        logits, labels, *statistics[:2], scale, 0.1 * scale, 0, 1000
    )
    return [*((x[:, None], None) for x in statistics), (gradient, None)]


RESULTS: dict[str, Callable[[], Results]] = {
    "attention": attention_results,
    "add_rms_norm": norm_results,
    "rope": rope_results,
    "swiglu": swiglu_results,
    "causal_conv": conv_results,
    "selective_scan": scan_results,
    "cross_entropy": loss_results,
}


def zero_row(x: Tensor) -> None:
    """Zero one row: a token, in one head if there are heads; an element of a vector."""
    rows = x[0, LAST if x.shape[1] > LAST else -1, 0] if x.dim() == 4 else x[-1]
    rows.zero_()


def zero_rows(x: Tensor) -> None:
    """Zero the last 32 tokens of a document in one head, or the last 32 rows."""
    if x.dim() == 4:
        end = LAST + 1 if x.shape[1] > LAST else x.shape[1]
        x[0, end - 32 : end, -1].zero_()
    else:
        x[-32:].zero_()


def zero_columns(x: Tensor) -> None:
    """Zero the last columns of one row."""
    row = x[0, 40, 0] if x.dim() == 4 else x[40] if x.dim() == 2 else x
    row[..., -8:].zero_()


def flip_signs(x: Tensor) -> None:
    """Flip the sign of the second half of one head, or of the rows."""
    half = x[0, x.shape[1] // 2 :, 0] if x.dim() == 4 else x[len(x) // 2 :]
    half.neg_()


def scale_head(x: Tensor) -> None:
    """Scale one head or row by 1.05."""
    (x[..., 0, :] if x.dim() > 1 else x).mul_(1.05)


FAULTS = (zero_row, zero_rows, zero_columns, flip_signs, scale_head)


@pytest.mark.parametrize("op", RESULTS)
def test_small_faults_are_found(op: str) -> None:
    for index, (exact, terms) in enumerate(RESULTS[op]()):
        rounded = exact.to(BF16)
        close(rounded, exact, rounded, f"result {index}", terms)
        for fault in FAULTS:
            wrong = rounded.clone()
            fault(wrong)
            with pytest.raises(AssertionError, match="a segment is off"):
                close(wrong, exact, rounded, f"result {index} {fault.__name__}", terms)


def rounded_attention(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Return output and gradients, rounded where the kernels round: weights, output, scores."""
    scale, repeats = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    weights = reference.attention_weights(q, k, IDS)
    q, grad = (x.float().transpose(1, 2) for x in (q, grad))
    k, v = (x.float().repeat_interleave(repeats, dim=2).transpose(1, 2) for x in (k, v))
    narrow = weights.to(BF16).float()
    out = (narrow @ v).to(BF16)
    delta = (grad * out.float()).sum(-1, keepdim=True)
    scores = (weights * (grad @ v.transpose(-1, -2) - delta)).to(BF16).float()
    gradients = [
        scale * scores @ k,
        scale * (scores.transpose(-1, -2) @ q).unflatten(1, (-1, repeats)).sum(2),
        (narrow.transpose(-1, -2) @ grad).unflatten(1, (-1, repeats)).sum(2),
    ]
    return [x.to(BF16).transpose(1, 2) for x in (out, *gradients)]


def test_attention_in_bf16_passes() -> None:
    twin = with_gradients(lambda *x: reference.attention(*x, IDS), HEADS, BF16)
    actual = rounded_attention(*HEADS, upstream_of(twin[:1], BF16)[0])
    for name, x, (exact, terms), other in zip(
        ("output", "q", "k", "v"), actual, attention_results(), twin, strict=True
    ):
        close(x, exact, other, name, terms)
    dq, dk = actual[1:3]
    assert dq[0, 256].abs().max() > 0 and dk[0, 256].abs().max() > 0, "the exact gradients are 0"


def test_segments() -> None:
    exact = torch.ones(2, 40, dtype=torch.float64)
    actual = exact.float()
    assert segment_error(actual, exact) == relative_rmse(actual, exact) == 0
    actual[1, 39] = 2  # in the last segment, which is not aligned
    assert segment_error(actual, exact) == pytest.approx(0.25)
    assert relative_rmse(actual, exact) == pytest.approx(80**-0.5)
    assert segment_error(1e-6 * actual, 1e-6 * exact) == pytest.approx(0.25, rel=1e-5)
    assert segment_error(actual, exact, terms=torch.tensor([1.0, 5.0])[:, None]) == pytest.approx(
        0.05
    )
    assert segment_error(actual, exact, twin=actual) == pytest.approx(0)
    actual[0, 0] = torch.nan
    assert not segment_error(actual, exact) <= 1e9
