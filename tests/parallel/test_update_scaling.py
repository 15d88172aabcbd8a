"""Factors on updates, entry by entry: as torch does it by hand, in every layout."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megagrow.parallel.sharding import parameter_plan
from megagrow.parallel.update_scaling import ScaledPart, UpdateScaler
from tests.helpers.hugging_face import tokens
from tests.helpers.parallel.engines import CONFIG, Built, Case, Plain, Weights, build, difference
from tests.helpers.parallel.scales import SCALES
from tests.helpers.reshard.definition import held
from tests.helpers.spawn import run_ranks

WORLD = 2
PLAN = parameter_plan(CONFIG, 1)
FACTORS = ((1.0, 1.0), (1.3, 1.0), (0.4, 0.0), (0.0, 1.0), (1.0, 0.7))
"""(new, old) of one step after the other."""

CASES = [Case(zero, tp) for zero in range(4) for tp in (1, 2)]
CASES += [Case(1, 1, offload=True), Case(2, 2, offload=True), Case(3, 1, offload=True)]
BF16 = [Case(zero, 1, bf16=True) for zero in (1, 2, 3)]


def new_entries() -> dict[str, Tensor]:
    """Whole tensors, rows, columns, or nothing new; one parameter after the other."""
    out = {}
    for index, (name, spec) in enumerate(PLAN.items()):
        mask = torch.zeros(spec.rows, spec.cols, dtype=torch.bool)
        if index % 4 == 0:
            mask[:] = True
        if index % 4 in (1, 2):
            mask[:: 3 - index % 2] = True
        if index % 4 == 2 and spec.cols > 1:
            mask[:, spec.cols // 2 :] = True
        out[name] = mask
    return out


NEW = new_entries()


@dataclass
class Found:
    """The weights after each step, and whether the forward weights were those at the end."""

    weights: list[Weights]
    refreshed: bool


def mark(built: Built) -> None:
    whole = {name: mask.float() for name, mask in NEW.items()}
    mine = held(built.layout, whole, built.topology.rank)
    built.engine.mark_new({name: mask.bool() for name, mask in mine.items() if mask.any()})


def train(case: Case) -> Found:
    built = build(case, SCALES)
    with pytest.raises(AssertionError, match="update factors require registered parts"):
        built.engine.set_update_factors(old=0.0)
    mark(built)
    weights = []
    for seed, (new, old) in enumerate(FACTORS):
        built.engine.set_update_factors(new, old)
        built.train_step(seed=seed)
        weights.append(built.weights())
    found = Found(weights, refreshed(built))
    built.release()
    return found


def refreshed(built: Built) -> bool:
    """Return True if passing the weights on to the forward pass once more changes nothing."""
    ids, _ = tokens(CONFIG, 1, 8)
    logits = []
    built.engine.train(False)
    for _ in range(2):
        with torch.no_grad():
            logits.append(built.engine.forward(ids, torch.arange(8).expand_as(ids), None).clone())
        built.engine.ready(built.engine.adam_step)
    return torch.equal(*logits)


def train_all() -> list[Found]:
    return [train(case) for case in CASES + BF16]


@pytest.fixture(scope="module")
def found() -> dict[Case, list[Found]]:
    by_rank = zip(*run_ranks(WORLD, train_all), strict=True)
    return dict(zip(CASES + BF16, map(list, by_rank), strict=True))


@pytest.fixture(scope="module")
def plain() -> list[Weights]:
    model, out = Plain(SCALES), []
    for seed, (new, old) in enumerate(FACTORS):
        factors = {name: torch.where(mask, new, old) for name, mask in NEW.items()}
        model.blend(lambda seed=seed: model.train_step(seed=seed), factors)
        out.append({name: tensor.clone() for name, tensor in model.weights().items()})
    return out


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_entry_takes_its_share_of_the_update(found, plain, case):
    for rank in found[case]:
        for step, (here, expected) in enumerate(zip(rank.weights, plain, strict=True)):
            assert difference(here, expected) < 1e-6, step
    assert min(difference(a, b) for a, b in itertools.pairwise(plain)) > 1e-4


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES + BF16, ids=str)
def test_a_factor_of_nothing_leaves_every_bit(found, case):
    for rank in found[case]:
        for step, frozen_new in ((2, False), (3, True)):
            before, after = rank.weights[step - 1], rank.weights[step]
            for name, mask in NEW.items():
                frozen = mask if frozen_new else ~mask
                assert torch.equal(after[name][frozen], before[name][frozen]), (step, name)
                if not frozen.all():
                    assert not torch.equal(after[name][~frozen], before[name][~frozen])


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES + BF16, ids=str)
def test_the_forward_weights_are_those_after_the_factors(found, case):
    assert all(rank.refreshed for rank in found[case])


def test_nothing_is_copied_while_both_factors_are_one():
    weight = torch.nn.Parameter(torch.ones(4))
    adam = torch.optim.AdamW([weight], lr=0.1)
    factors, copied = UpdateScaler(adam), []
    values = weight.data
    factors.register([(weight, ScaledPart(values, None))])
    adam.register_step_pre_hook(lambda *_: copied.append(len(factors._before)))
    for new, old in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.0), (1.0, 1.0)):
        factors.set(new, old)
        weight.grad = torch.ones(4)
        adam.step()
    assert copied == [0, 0, 1, 0]


def test_padding_beside_the_parts_is_updated_as_ever():
    flat = torch.nn.Parameter(torch.ones(6))
    adam = torch.optim.AdamW([flat], lr=0.1, weight_decay=0.0)
    factors = UpdateScaler(adam)
    factors.register([(flat, ScaledPart(flat.data[1:4], torch.tensor([True, False, False])))])
    factors.set(0.5, 0.0)
    flat.grad = torch.ones(6)
    adam.step()
    expected = torch.tensor([0.9, 0.95, 1.0, 1.0, 0.9, 0.9])
    assert torch.allclose(flat.detach(), expected, atol=1e-6)
