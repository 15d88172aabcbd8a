"""Tests of the cross-entropy kernels in Triton's interpreter, against fp64 and eager twins."""

import pytest
import torch
from torch import Tensor

from megagrow_kernels import cross_entropy, reference
from megagrow_kernels.accuracy import poisoned
from tests.helpers.kernels.accuracy import close, draw

SHAPES = ((1, 1), (1, 1000), (3, 129), (199, 37), (2, 64), (17, 65))
"""(tokens, vocabulary rows): a single one, several programs per row, edges of tiles."""
TYPES = (torch.float32, torch.float16)
IGNORED = -100


def labels_of(rows: int, width: int, first: int) -> Tensor:
    """Return labels in this rank's rows, in those below and above, and one that is ignored."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(first + 2 * width, (rows,), generator=generator)
    labels[0] = first + width // 2
    if rows > 1:
        labels[1] = IGNORED
    return labels


def weights_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and z_scale of each token, 0 for ignored tokens."""
    valid = labels != IGNORED
    return draw(len(labels), seed=5) * valid, 1e-2 * draw(len(labels), seed=6).abs() * valid


def label_terms(labels: Tensor, scale: Tensor, first: int, real: int, width: int) -> Tensor:
    """Return the terms of the gradient that cancel, (N, V): scale * (p - 1) at the label."""
    columns = torch.arange(first, first + width)
    at_label = (labels[:, None] == columns) & (columns < first + real)
    return scale.double().abs()[:, None] * at_label


def gradient(
    logits: Tensor, labels: Tensor, statistics: Tensor, scales: tuple[Tensor, Tensor], *rows: int
) -> Tensor:
    """Return the kernel's gradient without modifying `logits`."""
    logits = logits.clone()
    cross_entropy.vocab_gradient_(logits, labels, *statistics[:2], *scales, *rows)
    return logits


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape, padding, dtype):
    (rows, width), first = shape, 40
    real = max(1, width - padding)
    logits = (4 * draw(rows, width)).to(dtype)
    logits[:, real:] = torch.nan
    labels = labels_of(rows, real, first)
    scales = weights_of(labels)
    exact = reference.vocab_statistics(logits.double(), labels, first, real)
    twin = reference.vocab_statistics(logits, labels, first, real)
    with poisoned():
        actual = cross_entropy.vocab_statistics(logits, labels, first, real)
    assert actual.dtype == torch.float32
    for index, name in enumerate(("maximum", "total", "target")):
        close(*(x[index, :, None] for x in (actual, exact, twin)), name)
    assert (actual[2, labels < first] == 0).all() and (actual[2, labels >= first + real] == 0).all()

    wide = [scale.double() for scale in scales]
    exact = reference.vocab_gradient(logits.double(), labels, *exact[:2], *wide, first, real)
    twin = reference.vocab_gradient(logits, labels, *twin[:2], *scales, first, real)
    actual = gradient(logits, labels, actual, scales, first, real)
    close(actual, exact, twin, "gradient", label_terms(labels, scales[0], first, real, width))
    assert (actual[labels == IGNORED] == 0).all() and (actual[:, real:] == 0).all()


def test_the_gradient_is_that_of_the_loss():
    logits = (3 * draw(11, 50, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(11) * 4
    scale, z_scale = draw(11, seed=1), draw(11, seed=2)
    lse = logits.logsumexp(-1)
    ce = lse - logits[torch.arange(11), labels]
    (scale * ce + z_scale * lse.square()).sum().backward()
    narrow = logits.detach().float()
    statistics = cross_entropy.vocab_statistics(narrow, labels, 0, 50)
    actual = gradient(narrow, labels, statistics, (scale, z_scale), 0, 50)
    torch.testing.assert_close(actual.double(), logits.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [cross_entropy, reference], ids=["triton", "torch"])
def test_ranks_together_are_one(implementation):
    logits, labels = 5 * draw(9, 130), torch.arange(9) * 14
    full = reference.vocab_statistics(logits.double(), labels, 0, 125)
    parts = [
        implementation.vocab_statistics(logits[:, first : first + 26], labels, first, real)
        for first, real in ((0, 26), (26, 26), (52, 26), (78, 26), (104, 21))
    ]
    nothing = implementation.vocab_statistics(logits[:, :26], labels, 130, 0)
    assert nothing.tolist() == [[-torch.inf] * 9, [0.0] * 9, [0.0] * 9]
    with poisoned():
        actual = implementation.combine_statistics(torch.stack((*parts, nothing)))
    torch.testing.assert_close(actual.double(), full, rtol=1e-6, atol=1e-6)
    assert torch.equal(actual[0].double(), full[0]) and torch.equal(actual[2].double(), full[2])


def test_a_row_for_several_programs_is_the_same_row(monkeypatch):
    logits, labels = 5 * draw(2, 1000), torch.tensor([3, 999])
    cut = cross_entropy.vocab_statistics(logits, labels, 0, 1000)
    monkeypatch.setattr(cross_entropy, "FILL", 1)
    monkeypatch.setattr(cross_entropy, "programs", lambda device: 1)
    monkeypatch.setattr(cross_entropy, "combine_statistics_forward", None)  # is not called
    full = cross_entropy.vocab_statistics_forward(logits, labels, 0, 1000)
    torch.testing.assert_close(cut, full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value):
    logits = draw(3, 100)
    logits[1, 77] = value
    labels = torch.zeros(3, dtype=torch.long)
    maximum, total, target = cross_entropy.vocab_statistics(logits, labels, 0, 100)
    assert (total.log() + (maximum - target)).isfinite().tolist() == [True, False, True]


def test_large_logits():
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]])
    actual = cross_entropy.vocab_statistics(logits, torch.tensor([0, 2]), 0, 3)
    expected = torch.tensor([[3e38, -3e38], [1.0, 3.0], [3e38, -3e38]])
    torch.testing.assert_close(actual, expected)


def test_more_elements_than_32_bits_count():
    width, stride = 3, 2**30
    memory = torch.empty(2 * stride + width, dtype=torch.float16)  # most pages are never touched
    logits = memory.as_strided((3, width), (stride, 1))
    logits.copy_(draw(3, width))
    labels = torch.arange(3)
    near = logits.contiguous()
    actual = cross_entropy.vocab_statistics(logits, labels, 0, width)
    assert torch.equal(actual, cross_entropy.vocab_statistics(near, labels, 0, width))
    scales = weights_of(labels)
    expected = gradient(near, labels, actual, scales, 0, width)
    cross_entropy.vocab_gradient_(logits, labels, *actual[:2], *scales, 0, width)
    assert torch.equal(logits, expected)


def test_again_the_same_bits():
    logits, labels = draw(2, 700), torch.tensor([1, 699])
    first, again = (cross_entropy.vocab_statistics(logits, labels, 0, 700) for _ in range(2))
    assert torch.equal(first, again)
    scales = weights_of(labels)
    one, other = (gradient(logits, labels, first, scales, 0, 700) for _ in range(2))
    assert torch.equal(one, other)


def test_refusals():
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match="float64"):
        cross_entropy.vocab_statistics(draw(2, 3, dtype=torch.float64), labels, 0, 3)
    with pytest.raises(ValueError, match="strides"):
        cross_entropy.vocab_statistics(draw(3, 2).t(), labels, 0, 3)


def test_no_tokens():
    logits, labels = draw(0, 5), torch.zeros(0, dtype=torch.long)
    statistics = cross_entropy.vocab_statistics(logits, labels, 0, 5)
    assert statistics.shape == (3, 0)
    scales = weights_of(torch.zeros(0, dtype=torch.long))
    assert gradient(logits, labels, statistics, scales, 0, 5).shape == (0, 5)


def test_opcheck():
    logits, labels = draw(4, 70), torch.tensor([0, 69, IGNORED, 5])
    statistics = reference.vocab_statistics(logits, labels, 0, 70)
    ops = torch.ops.megagrow
    torch.library.opcheck(ops.vocab_statistics, (logits, labels, 0, 70))
    torch.library.opcheck(ops.combine_statistics, (torch.stack((statistics, statistics)),))
    arguments = (logits, labels, *statistics[:2], *weights_of(labels), 0, 70)
    torch.library.opcheck(ops.vocab_gradient, arguments)


def test_compiles_as_one_graph():
    labels = torch.tensor([0, 69, IGNORED, 5])
    scales = weights_of(labels)

    def loss_and_gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits * 2
        maximum, total, target = cross_entropy.combine_statistics(
            cross_entropy.vocab_statistics(logits, labels, 0, 70)[None]
        )
        cross_entropy.vocab_gradient_(logits, labels, maximum, total, *scales, 0, 70)
        return total.log() + (maximum - target), logits

    compiled = torch.compile(loss_and_gradient, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(draw(4, 70)), loss_and_gradient(draw(4, 70)), strict=True):
        assert torch.equal(actual, expected)
