"""Gradients of ZeRO 0 to 3: summed and reduced in fp32, in buckets, during the backward pass.

Adam's exp_avg after the first step is (1 - beta1) times the gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagrow.parallel.bucket_reduction import Piece, merged
from tests.helpers.parallel.engines import OPTIMIZER, Built, Case, Weights, build
from tests.helpers.spawn import run_ranks

WORLD = 4
UNCLIPPED = OPTIMIZER.model_copy(update={"gradient_clipping": 0.0})
CASES = {
    **{f"ZeRO {zero} bf16": Case(zero, 1, bf16=True) for zero in (1, 2, 3)},
    "ZeRO 1 bf16 checkpointing": Case(1, 1, bf16=True, recompute="full"),
    "ZeRO 2 bf16 offload": Case(2, 1, bf16=True, offload=True),
    "ZeRO 1 bf16, bf16 sums": Case(1, 1, bf16=True, communication="bf16"),
    "ZeRO 2 bf16, bf16 sums": Case(2, 1, bf16=True, communication="bf16"),
    "ZeRO 3 bf16, bf16 sums": Case(3, 1, bf16=True, communication="bf16"),
    "ZeRO 0 fp32": Case(0, 1),
    "ZeRO 0 fp32, bf16 sums": Case(0, 1, communication="bf16"),
}
OWN = [name for name in CASES if name[5] in "12"]
"""Cases of ZeRO 1 and 2."""
REPLICATED = [name for name in CASES if name[5] == "0"]
NORM = (torch.float32, 1)
"""All-reduce of the gradient norm: dtype and elements."""


@dataclass
class Found:
    """First step of one engine, seen from one rank."""

    gradients: Weights
    reduced: list[tuple[torch.dtype, int]] = field(default_factory=list)
    """Reduce calls of the step: dtype and elements."""
    before_the_end: int = 0
    """Calls of both kinds before the embedding's gradient, the last of a backward pass."""
    all_reduced: list[tuple[torch.dtype, int]] = field(default_factory=list)
    """All-reduce calls of the step."""
    alive: int = 0
    """Most gradients in the dtype of the weights that existed at once."""


@contextmanager
def recorded(found: Found, built: Built) -> Iterator[None]:
    """Records collectives, and gradients alive when the embedding's arrives."""
    module: Any = built.engine._engine.module
    originals = {"reduce": dist.reduce, "all_reduce": dist.all_reduce}

    def reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        found.reduced.append((tensor.dtype, tensor.numel()))
        return originals["reduce"](tensor, *args, **options)

    def all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        found.all_reduced.append((tensor.dtype, tensor.numel()))
        return originals["all_reduce"](tensor, *args, **options)

    def last(_: torch.Tensor) -> None:
        found.before_the_end = len(found.reduced) + len(found.all_reduced)
        alive = sum(parameter.grad is not None for parameter in module.parameters())
        found.alive = max(found.alive, alive)

    hook = module.model.embed_tokens.weight.register_hook(last)
    dist.reduce, dist.all_reduce = reduce, all_reduce
    try:
        yield
    finally:
        dist.reduce, dist.all_reduce = originals["reduce"], originals["all_reduce"]
        hook.remove()
    found.alive = max(found.alive, sum(p.grad is not None for p in module.parameters()))


def first_step(case: Case) -> Found:
    built, found = build(case, optimizer=UNCLIPPED), Found({})
    with recorded(found, built):
        built.train_step()
    found.gradients = {name: kinds["exp_avg"] / 0.1 for name, kinds in built.full().items()}
    built.release()
    return found


def all_cases() -> dict[str, Found]:
    return {name: first_step(case) for name, case in CASES.items()}


def reference() -> Weights:
    return first_step(Case(1, 1, bf16=True)).gradients


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    return run_ranks(WORLD, all_cases)[0]


@pytest.fixture(scope="module")
def one_rank() -> Weights:
    """Gradients of one rank that accumulates the micro-batches of all."""
    return run_ranks(1, reference)[0]


def difference(left: Weights, right: Weights) -> float:
    distance = sum((left[name] - right[name]).double().square().sum() for name in right)
    return float((distance / sum(right[n].double().square().sum() for n in right)).sqrt())


@pytest.mark.dist
def test_bf16_gradients_are_the_same_in_every_layout(found, one_rank):
    for name, case in CASES.items():
        if not case.bf16:
            continue
        distance = difference(found[name].gradients, one_rank)
        if case.communication == "fp32":
            assert distance < 1e-6, (name, distance)
        else:
            assert 1e-4 < distance < 1e-2, (name, distance)


@pytest.mark.dist
@pytest.mark.parametrize("name", OWN)
def test_gradients_are_reduced_once_in_buckets_during_the_backward_pass(found, name):
    case, seen = CASES[name], found[name]
    total = sum(gradient.numel() for gradient in seen.gradients.values())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.communication]
    assert {kind for kind, _ in seen.reduced} == {dtype}
    assert sum(elements for _, elements in seen.reduced) == total
    assert max(elements for _, elements in seen.reduced) < total / 2
    assert seen.before_the_end >= len(seen.reduced) / 3
    assert seen.all_reduced == [NORM]


@pytest.mark.dist
@pytest.mark.parametrize("name", OWN)
def test_no_gradient_outlives_its_layer(found, name):
    assert found[name].alive == 0


@pytest.mark.dist
@pytest.mark.parametrize("name", REPLICATED)
def test_zero_0_reduces_each_gradient_during_the_backward_pass(found, name):
    case, seen = CASES[name], found[name]
    *sums, norm = seen.all_reduced
    assert norm == NORM and not seen.reduced
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.communication]
    sizes = [gradient.numel() for gradient in seen.gradients.values()]
    assert {kind for kind, _ in sums} == {dtype}
    assert sorted(size for _, size in sums) == sorted(sizes)
    assert seen.before_the_end == len(sums) - 1, "all but the embedding's"


def one_replica() -> Found:
    return first_step(Case(0, 1))


@pytest.mark.dist
def test_one_rank_of_zero_0_reduces_nothing():
    assert run_ranks(1, one_replica)[0].all_reduced == [NORM]


def accumulated() -> tuple[list[tuple], list[tuple]]:
    """Reduce calls of two micro-batches under ZeRO 1 and 2."""
    return tuple(first_step(Case(zero, 1, bf16=True)).reduced for zero in (1, 2))


@pytest.mark.dist
def test_zero_1_reduces_once_per_step_and_zero_2_in_every_pass():
    once, each = run_ranks(2, accumulated)[0]
    totals = [sum(elements for _, elements in calls) for calls in (once, each)]
    assert totals[1] == 2 * totals[0]


def test_adjacent_pieces_of_one_owner_are_one_reduce():
    pieces = [Piece(1, 0, 8, 10), Piece(0, 0, 4, 8), Piece(0, 0, 0, 4), Piece(0, 1, 8, 9)]
    assert list(merged(pieces)) == [Piece(0, 0, 0, 8), Piece(0, 1, 8, 9), Piece(1, 0, 8, 10)]
