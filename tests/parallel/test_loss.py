"""The vocabulary-parallel cross-entropy against torch's, values and gradients."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from megagrow.model.ops import TORCH_LOSS, triton_loss
from megagrow.parallel.loss import IGNORED, cross_entropy
from megagrow.parallel.process_groups import make_topology
from megagrow.parallel.sharding import pad
from tests.helpers.spawn import run_ranks

WORLD = 4
SIZES = (1, 2, 4)
OPS = {"torch": TORCH_LOSS, "triton": triton_loss()}
LAYOUTS = [(tp, backend) for backend in OPS for tp in SIZES]


@dataclass(frozen=True)
class Case:
    """Logits (B, S, V) and labels; the gradient is that of loss / 3."""

    logits: torch.Tensor
    labels: torch.Tensor
    tolerance: float = 1e-6
    z_loss: float = 0.0


def draw(vocab: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(2, 6, vocab, generator=torch.Generator().manual_seed(vocab))


def cases(backend: str) -> dict[str, Case]:
    labels = torch.randint(101, (2, 6), generator=torch.Generator().manual_seed(1))
    some = labels.clone()
    some[0, :3] = some[1, -1] = IGNORED
    edges = torch.tensor([[0, 25, 26, 51, 52, 77], [78, 100, 50, 51, 99, 100]])
    out = {
        "plain": Case(draw(101), labels),
        "first and last of each rank": Case(draw(101), edges),
        "some ignored": Case(draw(101), some),
        "all ignored": Case(draw(101), torch.full((2, 6), IGNORED)),
        "large": Case(draw(101, 3e4), labels),
        "near the end of fp32": Case(draw(101).sign() * 1e37, labels),
        "bf16": Case(draw(101, 8).bfloat16(), some, tolerance=4e-3),
        "a rank of padding only": Case(draw(5), labels % 5),
        "z-loss": Case(draw(101, 3), some, z_loss=1e-2),
    }
    if backend == "triton":
        del out["bf16"]  # which its interpreter computes wrongly
    return out


def measure(tp: int, backend: str) -> dict[str, tuple]:
    """By case: the loss, and the gradient of this rank's logits, padding included."""
    topology = make_topology(tp, torch.device("cpu"))
    out = {}
    for name, case in cases(backend).items():
        vocab = case.logits.shape[-1]
        # Padding holds what would win every softmax.
        padded = F.pad(case.logits, (0, pad(vocab, tp) - vocab), value=3e38)
        mine = padded.chunk(tp, dim=-1)[topology.tp_rank].clone().requires_grad_()
        loss = cross_entropy(mine, case.labels, vocab, topology, OPS[backend], case.z_loss)
        (loss[0] / 3).backward()
        out[name] = *loss.detach(), mine.grad
    return out


def measure_all() -> list[dict]:
    return [measure(*layout) for layout in LAYOUTS]


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = case.logits.double().requires_grad_()
    loss = F.cross_entropy(
        logits.flatten(0, 1), case.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    valid = case.labels != IGNORED
    z_loss = case.z_loss * logits.logsumexp(-1).square()[valid].sum()
    loss = loss + z_loss
    (loss / 3).backward()
    return loss.detach(), z_loss.detach(), logits.grad


@pytest.fixture(scope="module")
def found() -> list[list[dict]]:
    return run_ranks(WORLD, measure_all)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("tp", "backend", "name"), [(*layout, name) for layout in LAYOUTS for name in cases(layout[1])]
)
def test_loss_and_gradients_are_torchs(found, tp, backend, name):
    case = cases(backend)[name]
    loss, z_loss, gradient = expected(case)
    gradient = F.pad(gradient, (0, pad(gradient.shape[-1], tp) - gradient.shape[-1]))
    for rank in range(WORLD):
        mine, mine_z, grad = found[rank][LAYOUTS.index((tp, backend))][name]
        assert mine.dtype == torch.float32 and grad.dtype == case.logits.dtype
        assert mine.double() == pytest.approx(loss.item(), rel=1e-6)
        assert mine_z.double() == pytest.approx(z_loss.item(), rel=1e-6)
        share = gradient.chunk(tp, dim=-1)[rank % tp]
        assert (grad.double() - share).abs().max() <= case.tolerance
        assert (grad[share == 0] == 0).all(), "what takes no part has no gradient"


@pytest.mark.dist
def test_all_ranks_of_a_group_agree_to_the_bit(found):
    for index, (tp, backend) in enumerate(LAYOUTS):
        for name in cases(backend):
            losses = [found[rank][index][name][0] for rank in range(WORLD)]
            for rank, loss in enumerate(losses):
                assert torch.equal(loss, losses[rank // tp * tp]), (tp, name)
