"""The computed shuffle: each number once, another order for another key, the same everywhere."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data.blend import Permutation, mix


@given(size=st.integers(1, 600), key=st.lists(st.integers(), max_size=3))
@settings(max_examples=150, deadline=None)
def test_every_number_comes_once(size, key):
    permutation = Permutation(size, *key)
    assert sorted(map(permutation, range(size))) == list(range(size))


@given(size=st.integers(1 << 30, 1 << 62), index=st.integers(0, (1 << 30) - 1))
@settings(max_examples=50, deadline=None)
def test_huge_sizes_stay_in_range_without_a_table(size, index):
    assert 0 <= Permutation(size, 7)(index) < size
    assert len({Permutation(size, 7)(i) for i in range(20)}) == 20


def test_keys_give_different_orders():
    orders = {
        tuple(map(Permutation(50, seed, epoch), range(50)))
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


@pytest.mark.parametrize("size", [2, 3, 5, 8, 12])
def test_each_number_is_equally_often_in_each_place(size):
    trials = 3000
    seen = Counter((i, Permutation(size, key)(i)) for key in range(trials) for i in range(size))
    expected = trials / size
    chi_squared = sum(
        (seen[i, j] - expected) ** 2 / expected for i in range(size) for j in range(size)
    )
    freedom = (size - 1) ** 2
    assert chi_squared < freedom + 6 * (2 * freedom) ** 0.5


def test_neighbours_do_not_stay_together():
    permutation = Permutation(10_000, 1234)
    steps = [permutation(i + 1) - permutation(i) for i in range(9_999)]
    assert sum(abs(step) == 1 for step in steps) < 15  # 2 expected
    assert len(set(steps)) > 4_000


def test_the_order_of_a_run_never_changes():
    assert [mix(), mix(0), mix(1, 2)] == [0, 16294208416658607535, 13608149317741381227]
    assert list(map(Permutation(10, 1234, 0, 0), range(10))) == [6, 5, 0, 8, 1, 7, 2, 9, 3, 4]


def test_numbers_outside_are_refused():
    for index in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(5, 0)(index)
