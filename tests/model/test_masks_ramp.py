"""Strength of all new parts as a function of tokens alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config.schema import ModelConfig
from megagrow.model.masks import Masks, masks_at
from tests.helpers.model.grown_pairs import grown_pair, model_config


def factors(masks: Masks | None, source: ModelConfig, target: ModelConfig) -> list[float]:
    """Return the strengths of layers, feed-forward, residual stream and heads."""
    if masks is None:
        return [1.0] * 4
    pairs = (
        (masks.ffn, source.intermediate_size),
        (masks.residual, source.hidden_size),
        (masks.groups, source.num_key_value_heads),
    )
    out = [masks.layers[-1]]
    for mask, old in pairs:
        new = torch.ones(1) if mask is None else mask[old:]
        assert mask is None or (mask[:old] == 1).all()
        assert (new == new[0]).all()
        out.append(new[0].item())
    return out


@given(st.integers(1, 10**13), st.data())
def test_masks_only_rise_and_one_axis_after_the_other(ramp, data):
    source, target = grown_pair()
    tokens = sorted(data.draw(st.lists(st.integers(0, 2 * ramp), min_size=2, max_size=8)))
    seen = [factors(masks_at(source, target, t, ramp), source, target) for t in tokens]
    for t, (depth, *width) in zip(tokens, seen, strict=True):
        assert depth == pytest.approx(min(1.0, t / ramp))
        assert sum(width) == pytest.approx(min(3.0, 3 * t / ramp), abs=1e-6)
        assert width == sorted(width, reverse=True)
        assert sum(0 < c < 1 for c in width) <= 1
    for before, after in itertools.pairwise(seen):
        assert all(a <= b for a, b in zip(before, after, strict=True))


def test_the_axes_that_do_not_grow_take_no_part():
    source = model_config(2, 2)
    wide = model_config(2, 2, intermediate_size=20, hidden_size=10)
    assert masks_at(source, wide, 5, 10).residual.tolist() == [1.0] * 9 + [0.0]
    assert masks_at(source, wide, 5, 10).ffn is None, "a half of the ramp for each of two axes"
    assert masks_at(source, wide, 9, 10).residual[-1].item() == pytest.approx(0.8)
    assert masks_at(source, wide, 9, 10).groups is None
    assert masks_at(source, wide, 9, 10).layers == ()
    deep = model_config(2, 2, num_hidden_layers=3)
    assert masks_at(source, deep, 9, 10).layers == (1.0, 1.0, 0.9)
    assert masks_at(source, source, 0, 10) is None
