"""A gradient that is not finite, or a loss above a limit, on one rank alone: no rank changes a bit.

The layouts are all those in which the state is kept differently.
"""

import math

import pytest
import torch
from torch import Tensor

from megagrow.parallel.loss import cross_entropy
from megagrow.parallel.update_scaling import StepLimits
from tests.helpers.hugging_face import tokens
from tests.helpers.parallel.engines import (
    BATCH,
    CONFIG,
    LENGTH,
    LR,
    OPTIMIZER,
    Built,
    Case,
    build,
)
from tests.helpers.parallel.scales import SCALES
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.slow

WORLD = 2
CASES = [Case(zero, tp, bf16=bf16) for zero in range(4) for tp in (1, 2) for bf16 in (False, True)]
CASES += [Case(z, 1, offload=True, bf16=bf16) for z in (1, 2, 3) for bf16 in (False, True)]
HOW = {
    "plain": (None, OPTIMIZER.model_copy(update={"gradient_clipping": 0.0})),
    "scaled": (SCALES, OPTIMIZER),
    "muon": (None, OPTIMIZER.model_copy(update={"type": "muon"})),
}
"""Scales and optimizer: without and with a weighted norm and clipping, and Muon."""


def bytes_of(built: Built) -> tuple[dict[str, dict[str, bytes]], int, bytes]:
    """All that a rank holds: weights, moments, Adam's step, and what the forward pass makes."""
    storage = {
        name: {kind: part.detach().clone().numpy().tobytes() for kind, part in kinds.items()}
        for name, kinds in built.engine.storage().items()
    }
    ids, _ = tokens(CONFIG, 1, LENGTH)
    built.engine.train(False)
    with torch.no_grad():
        logits = built.engine.forward(ids, torch.arange(LENGTH).expand_as(ids), None)
    built.engine.train()
    return storage, built.engine.adam_step, logits.float().numpy().tobytes()


def spoilt_step(built: Built, rank: int, what: float) -> float:
    """A step in whose first micro batch one rank has a value that is not finite in its gradient."""

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 0] = what
        return gradient

    ids, labels = tokens(CONFIG, BATCH, LENGTH, seed=7)
    mine = range(built.topology.dp_rank, BATCH, built.topology.dp)
    for number, index in enumerate(mine):
        row, mark = ids[index : index + 1], labels[index : index + 1]
        logits = built.engine.forward(row, torch.arange(LENGTH).expand_as(row), None)
        if number == 0 and built.topology.rank == rank:
            logits.register_hook(spoil)
        loss = cross_entropy(logits, mark, CONFIG.vocab_size, built.topology)[0] / LENGTH
        built.engine.backward(loss, last=index == mine[-1])
    return built.engine.step(LR).item()


def held_steps(built: Built) -> list[bool]:
    """Two steps above a limit: of the loss on rank 1 alone, then of the norm; whether their norms
    are known as that of a step without limits."""
    found, loss = [], torch.tensor(float(built.topology.rank), dtype=torch.float64)
    for limits in (StepLimits(loss=0.5, norm=math.inf), StepLimits(loss=math.inf, norm=1e-6)):
        built.engine.gate.set(loss, limits)
        norm = built.train_step(seed=1)
        exceeded = built.engine.gate.exceeded
        found.append(math.isfinite(norm) and norm > 1e-6 and exceeded.item() == 1)
    built.engine.gate.set(loss, StepLimits(loss=1.0, norm=1e6))  # not exceeded
    return found


def skip(case: Case, how: str) -> tuple[list[float], bool, bool]:
    """The norms of the spoilt steps, whether they left every bit, and whether what follows is what
    would have followed without them."""
    scales, optimizer = HOW[how]
    spoilt, spared = build(case, scales, optimizer), None
    spoilt.train_step(seed=0)
    before = bytes_of(spoilt)
    norms = [spoilt_step(spoilt, *what) for what in ((0, math.nan), (1, math.inf))]
    kept = all(held_steps(spoilt)) and bytes_of(spoilt) == before
    spoilt.train_step(seed=1)
    after = bytes_of(spoilt)
    spoilt.release()
    spared = build(case, scales, optimizer)
    for seed in (0, 1):
        spared.train_step(seed=seed)
    same = bytes_of(spared) == after
    assert after != before
    spared.release()
    return norms, kept, same


def skip_all(cases: list[Case], how: str) -> list[tuple[list[float], bool, bool]]:
    return [skip(case, how) for case in cases]


@pytest.mark.dist
@pytest.mark.parametrize("how", HOW)
def test_nothing_changes_and_nothing_stays(how: str) -> None:
    cases = [case for case in CASES if how == "scaled" or not case.bf16]
    if how == "muon":
        cases = [Case(0, 2), Case(1, 2), Case(2, 1, offload=True), Case(3, 1)]
    for rank, results in enumerate(run_ranks(WORLD, skip_all, cases, how)):
        for case, (norms, kept, same) in zip(cases, results, strict=True):
            assert not any(map(math.isfinite, norms)), (rank, case, norms)
            assert kept, (rank, case)
            assert same, (rank, case)
