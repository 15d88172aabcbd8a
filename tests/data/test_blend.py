"""The blend: shares kept at every moment, and counts that agree with counting."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data.blend import PERIOD, Blend
from megagrow.errors import InputError

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


@given(weights=WEIGHTS)
@settings(max_examples=15, deadline=None)
def test_shares_are_kept_at_every_moment(weights):
    blend = Blend(weights)
    seen = [0] * len(weights)
    per_period = [blend.count(c, blend.period) for c in range(len(weights))]
    assert min(per_period) >= 1 and sum(per_period) == blend.period
    for slot in range(blend.period):
        seen[blend.corpus_of(slot)] += 1
        if slot % 37 == 0:
            for count, whole in zip(seen, per_period, strict=True):
                assert abs(count - (slot + 1) * whole / blend.period) < len(weights)
    for weight, whole in zip(weights, per_period, strict=True):
        ideal = weight / sum(weights) * blend.period
        # Off by rounding, and by the slots given to those whose share is less than one.
        assert abs(whole - max(ideal, 1)) < len(weights) + 1


@given(weights=WEIGHTS, slots=st.lists(st.integers(0, 3 * PERIOD), max_size=5))
@settings(max_examples=15, deadline=None)
def test_counts_agree_with_counting(weights, slots):
    blend = Blend(weights)
    for slot in slots:
        for corpus in range(len(weights)):
            counted = sum(blend.corpus_of(k) == corpus for k in range(slot))
            assert blend.count(corpus, slot) == counted
        corpus = blend.corpus_of(slot)
        assert blend.slot_of(corpus, blend.count(corpus, slot)) == slot


def test_equal_weights_alternate():
    assert [Blend([3.0, 3.0]).corpus_of(k) for k in range(6)] == [0, 1, 0, 1, 0, 1]


def test_three_to_one():
    blend = Blend([0.75, 0.25])
    for start in range(0, 400, 4):
        assert sorted(blend.corpus_of(start + i) for i in range(4)) == [0, 0, 0, 1]


def test_far_positions_need_no_search():
    blend = Blend([1.0, 2.0])
    slot = 10**15
    assert blend.count(0, slot) + blend.count(1, slot) == slot
    assert abs(blend.count(0, slot) / slot - 1 / 3) < 1e-4


def test_too_many_corpora_are_refused():
    with pytest.raises(InputError, match="too many to blend"):
        Blend([1.0] * (PERIOD + 1))
