"""Head and loss in chunks: against plain torch in fp64, in memory, and in engines of every kind."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.model.ops import TORCH_LOSS, LossOps, triton_loss
from megagrow.parallel.loss import IGNORED, cross_entropy, linear_cross_entropy
from megagrow.parallel.process_groups import Topology
from tests.helpers.hugging_face import tiny, tokens
from tests.helpers.parallel.alive import Alive
from tests.helpers.parallel.engines import (
    BATCH,
    LENGTH,
    LR,
    Built,
    Case,
    Weights,
    build,
    difference,
)
from tests.helpers.spawn import run_ranks

OPS = {"torch": TORCH_LOSS, "triton": triton_loss()}
WORLD = 4


class Alone:
    """A group of one rank, without a process group."""

    def size(self) -> int:
        return 1


ALONE = Topology(0, 1, 1, Alone(), Alone(), torch.device("cpu"))


def problem(
    shape: tuple[int, int], width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (B, S, D), weight (vocab, D) and labels (B, S), of which one is ignored."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 2 * width**-0.5).to(dtype)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[0, 1] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def by_definition(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, ...]:
    """Loss, and the gradients of the loss / 3; in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t()).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    loss = loss + z_loss * logits.logsumexp(-1).square()[labels.flatten() != IGNORED].sum()
    return loss.detach(), *torch.autograd.grad(loss / 3, (hidden, weight))


def in_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, ops: LossOps, z_loss: float = 0.0
) -> tuple[Tensor, ...]:
    """The same by `linear_cross_entropy`."""
    loss = linear_cross_entropy(hidden, weight, labels, len(weight), ALONE, ops, z_loss)[0]
    return loss.detach(), *torch.autograd.grad(loss / 3, (hidden, weight))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunks", [1, 4, 1000])
@pytest.mark.parametrize("backend", OPS)
def test_loss_and_gradients_are_torchs(backend, chunks, z_loss):
    inputs = problem((3, 7), 24, 53)
    expected = by_definition(*inputs, z_loss)
    found = in_chunks(*inputs, replace(OPS[backend], chunks=chunks), z_loss)
    for one, other, like in zip(found, expected, (None, *inputs), strict=False):
        assert one.dtype == torch.float32 and (like is None or one.shape == like.shape)
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    assert (found[1][0, 1] == 0).all(), "an ignored token has no gradient"


@pytest.mark.parametrize("backend", OPS)
def test_again_the_same_bits(backend):
    inputs = problem((2, 10), 16, 70)
    for one, other in zip(*(in_chunks(*inputs, OPS[backend]) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def error(found: Tensor, expected: Tensor) -> float:
    """The root mean square of the error, as a share of that of what is expected."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunks", [10, 64])
def test_bf16_weights_have_gradients_nearly_as_exact_as_those_of_all_tokens_at_once(chunks):
    inputs = problem((2, 640), 32, 200, torch.bfloat16)
    _, of_hidden, of_weight = by_definition(*inputs)
    found = in_chunks(*inputs, replace(TORCH_LOSS, chunks=chunks))
    hidden, weight, labels = inputs
    loss = cross_entropy(hidden @ weight.t(), labels, 200, ALONE)[0]
    plain = torch.autograd.grad(loss / 3, (hidden, weight))
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    assert error(found[1], of_hidden) < 1.5 * error(plain[0], of_hidden)
    assert error(found[2], of_weight) < 5 * error(plain[1], of_weight) < 2e-2


def test_under_autocast_weights_in_fp32_have_such_gradients():
    inputs = problem((2, 64), 32, 200)
    expected = by_definition(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = in_chunks(*inputs, replace(TORCH_LOSS, chunks=10))
    assert found[1].dtype == found[2].dtype == torch.float32
    assert found[0].double() == pytest.approx(expected[0].item(), rel=1e-3)
    assert error(found[1], expected[1]) < 2e-2 and error(found[2], expected[2]) < 2e-2


def without_cycles(ops: LossOps) -> LossOps:
    """Triton's interpreter, and it alone, leaves its arguments to the garbage collector."""
    gc.freeze()  # a collection then looks at what is new

    def cleaned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            out = function(*arguments)
            gc.collect()
            return out

        return call

    return replace(ops, statistics=cleaned(ops.statistics), gradient=cleaned(ops.gradient))


@pytest.mark.parametrize(
    ("backend", "dtype", "sequence"),
    [("torch", torch.float32, 100), ("torch", torch.bfloat16, 100), ("triton", torch.float32, 10)],
    ids=str,
)
def test_memory_stays_under_an_eighth_of_the_logits(backend, dtype, sequence):
    hidden, weight, labels = problem((2, sequence), 4, 512, dtype)
    logits = labels.numel() * len(weight) * dtype.itemsize
    gradients = (hidden.numel() + weight.numel()) * dtype.itemsize
    ops = without_cycles(OPS[backend])
    with Alive() as alive:
        loss = linear_cross_entropy(hidden, weight, labels, 512, ALONE, ops)[0]
        loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert gradients + logits / 100 < alive.peak < gradients + logits / 8
    with Alive() as alive:
        cross_entropy(hidden @ weight.t(), labels, 512, ALONE, ops)[0].backward()
    assert alive.peak > logits, "the plain way has all logits in memory, as this measure sees"


def test_without_gradients_there_are_none():
    hidden, weight, labels = problem((2, 640), 8, 1024)
    expected = by_definition(hidden, weight, labels)[0]
    with torch.no_grad(), Alive() as alive:
        loss = linear_cross_entropy(hidden, weight, labels, 1024, ALONE)[0]
    assert not loss.requires_grad and loss.double() == pytest.approx(expected.item(), rel=1e-6)
    assert alive.peak < weight.numel() * 4 + labels.numel() * 1024 * 4 / 8


TIED = tiny(num_key_value_heads=2, tie_word_embeddings=True)
UNTIED = tiny(num_key_value_heads=2)
WIDE = tiny(num_key_value_heads=4, tie_word_embeddings=True)
CASES = [
    (UNTIED, Case(zero=0, tp=1, bf16=True), "torch"),
    (TIED, Case(zero=1, tp=2), "torch"),
    (TIED, Case(zero=2, tp=1, recompute="full"), "triton"),
    (UNTIED, Case(zero=3, tp=2, sequence_parallel=True), "triton"),
    (TIED, Case(zero=3, tp=2, bf16=True), "torch"),
    (WIDE, Case(zero=3, tp=4, recompute="selective"), "triton"),
]
"""An update takes one, two or four micro batches: as many as TP."""

Loss = Callable[[Built, Tensor, Tensor], Tensor]


def plain(built: Built, ids: Tensor, labels: Tensor) -> Tensor:
    logits = built.engine.forward(ids, torch.arange(LENGTH).expand_as(ids), None)
    return cross_entropy(logits, labels, UNTIED.vocab_size, built.topology, z_loss=1e-3)[0]


def chunked(ops: LossOps, built: Built, ids: Tensor, labels: Tensor) -> Tensor:
    """In chunks of two tokens, and one."""
    head = partial(
        linear_cross_entropy,
        labels=labels,
        vocab_size=UNTIED.vocab_size,
        topology=built.topology,
        ops=replace(ops, chunks=3),
        z_loss=1e-3,
    )
    return built.engine.forward(ids, torch.arange(LENGTH).expand_as(ids), None, None, head)[0]


def train(built: Built, loss_of: Loss) -> tuple[list[float], list[float], Weights]:
    """Two updates: this rank's losses, the gradients' norms, and the weights after them; then the
    loss of an evaluation."""
    losses, norms = [], []
    for seed in range(2):
        ids, labels = tokens(UNTIED, BATCH, LENGTH, seed)
        labels[0, 3] = IGNORED
        mine = range(built.topology.dp_rank, BATCH, built.topology.dp)
        for index in mine:
            loss = loss_of(built, ids[index : index + 1], labels[index : index + 1])
            built.engine.backward(loss / LENGTH, last=index == mine[-1])
            losses.append(loss.item())
        norms.append(built.engine.step(LR).item())
    built.engine.train(False)
    with torch.no_grad():
        losses.append(loss_of(built, ids[:1], labels[:1]).item())
    return losses, norms, built.weights()


def compare() -> list[tuple]:
    out = []
    for config, case, backend in CASES:
        found = []
        for loss_of in (plain, partial(chunked, OPS[backend])):
            built = build(case, config=config)
            found.append(train(built, loss_of))
            built.release()
        (losses, norms, weights), (others, other_norms, other_weights) = found
        out.append((losses, others, norms, other_norms, difference(weights, other_weights)))
    return out


@pytest.fixture(scope="module")
def compared() -> list[list[tuple]]:
    return run_ranks(WORLD, compare)


@pytest.mark.dist
@pytest.mark.parametrize("index", range(len(CASES)), ids=str)
def test_engines_train_as_with_all_logits(compared, index):
    rough = CASES[index][1].bf16
    for found in compared:
        losses, others, norms, other_norms, weights = found[index]
        assert others == pytest.approx(losses, rel=1e-2 if rough else 1e-5)
        assert other_norms == pytest.approx(norms, rel=5e-2 if rough else 1e-4)
        assert rough or weights < 1e-4, "an update moves weights by 1e-2"
