"""Initial weights: a function of seed, name and position, whoever draws them."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.fill import fill_initial, initial_rows, normal
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import same, storage_of
from tests.helpers.reshard.models import layouts, models

LENGTH = 2**16


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return normal("7/a.weight", 0, LENGTH)


@given(st.integers(0, 200), st.integers(0, 200))
def test_any_range_is_the_slice_of_the_whole(first, count):
    whole = normal("seed/name", 0, 400)
    assert torch.equal(normal("seed/name", first, count), whole[first : first + count])


def test_ranges_far_out_agree_where_they_meet():
    first = 3 * 2**40 + 1
    assert torch.equal(normal("x", first, 9)[5:], normal("x", first + 5, 4))


@given(st.integers(0, 30), st.integers(1, 18))
def test_rows_are_those_of_the_whole_tensor(first, count):
    spec = parameter_plan(tiny(), 1)["model.layers.0.mlp.down_proj.weight"]
    whole = initial_rows(spec, 5, range(spec.rows))
    rows = range(first, min(first + count, spec.rows))
    assert torch.equal(initial_rows(spec, 5, rows), whole[rows.start : rows.stop])


def test_distribution_is_standard_normal(sample):
    # Bounds are five standard errors of each statistic.
    error = LENGTH**-0.5
    values = sample.double()
    assert abs(values.mean()) < 5 * error
    assert abs(values.var() - 1) < 5 * math.sqrt(2) * error
    assert abs((values**3).mean()) < 5 * math.sqrt(15) * error
    # Kolmogorov and Smirnov: the largest distance of the two distribution functions.
    ordered = np.sort(values.numpy())
    expected = np.array([NormalDist().cdf(x) for x in ordered])
    found = np.arange(LENGTH) / LENGTH
    assert np.abs(found - expected).max() < 1.95 * error  # one draw in a thousand is beyond
    assert 4 < sample.abs().max() < 6


def test_neighbours_are_not_correlated(sample):
    for lag in (1, 2, 3, 4, 8):
        assert abs((sample[lag:] * sample[:-lag]).mean()) < 5 * LENGTH**-0.5


@pytest.mark.parametrize("other", ["8/a.weight", "7/b.weight"])
def test_other_seeds_and_names_are_independent(sample, other):
    assert abs((sample * normal(other, 0, LENGTH)).mean()) < 5 * LENGTH**-0.5


class Stuck:
    """A generator that always gives one number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def random_raw(self, count: int) -> np.ndarray:
        return np.full(count, self.number, dtype=np.uint64)


@pytest.mark.parametrize("number", [0, 2**64 - 1])
def test_the_extremes_of_the_generator_are_finite(monkeypatch, number):
    monkeypatch.setattr(np.random, "Philox", lambda **_: Stuck(number))
    assert torch.isfinite(normal("any", 0, 4)).all()


def test_gains_are_one_and_deviations_those_of_the_plan():
    plan = parameter_plan(tiny(hidden_size=64, initializer_range=0.3), 1)
    for spec in plan.values():
        values = initial_rows(spec, 1, range(spec.rows))
        assert values.shape == (spec.rows, spec.cols)
        if spec.is_vector:
            assert (values == 1).all()
        else:
            assert values.std().item() == pytest.approx(spec.initial.scale, rel=0.1), spec


@settings(max_examples=30, deadline=None)
@given(st.data(), models())
def test_every_layout_draws_the_same_weights(data, config):
    layout = data.draw(layouts(config))
    whole = {}
    for name, spec in layout.plan.items():
        zero = torch.zeros(spec.rows, spec.cols)
        weights = initial_rows(spec, 3, range(spec.rows))
        whole[name] = {"fp32": weights, "exp_avg": zero, "exp_avg_sq": zero}
    nothing = {name: dict.fromkeys(kinds, kinds["exp_avg"]) for name, kinds in whole.items()}
    for rank in range(layout.world_size):
        storage = storage_of(layout, nothing, rank)
        fill_initial(layout, rank, storage, seed=3)
        assert same(storage, storage_of(layout, whole, rank))
