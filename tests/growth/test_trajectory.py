"""Training after a growth: the same trajectory where the map says so; what parts copies."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.parallel.optimizers.rules import MuonRule, ParamScale
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.growth.cases import Case, case, sources, times
from tests.helpers.hugging_face import tiny
from tools.docs.operators.dense_growth import grown
from tools.docs.operators.reference_training import (
    AFTER,
    BEFORE,
    Adam,
    random_batches,
    trained,
    trained_source,
)
from tools.docs.operators.reference_training import trajectory_difference as diverged

SOURCE = tiny(hidden_size=8, head_dim=4, num_key_value_heads=2, intermediate_size=6, vocab_size=11)


@settings(max_examples=8, deadline=None)
@given(sources(), st.tuples(*[st.integers(1, 3)] * 3), st.sampled_from(("interleaved", "tiled")))
def test_a_copied_model_follows_its_source(source: Any, factors: Any, order: str) -> None:
    found = case(source, times(source, *factors), operator="mup_copy", copy_order=order)
    assert diverged(found) <= 1e-9


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("operator", ["mup_copy", "bert2bert_fpi"])
def test_what_it_takes_to_follow(tied: bool, operator: str) -> None:
    """The states, and every factor on lr, weight decay, eps and norm: without one it diverges."""
    source = SOURCE.model_copy(update={"tie_word_embeddings": tied})
    found = case(source, times(source, 2, 2, 2), operator=operator)
    # An eps of the size of the gradients, so that it matters.
    adam = Adam(eps=1e-2, weight_decay=1.0, clipping=0.2)
    assert diverged(found, adam=adam) <= 1e-9
    assert diverged(found, transported=False, adam=adam) > 1e-2
    for field in ("lr", "weight_decay", "eps", "norm"):
        without = {
            name: ParamScale(**{**vars(scale), field: 1.0})
            for name, scale in found.growth.scales.items()
        }
        assert diverged(found, scales=without, adam=adam) > 1e-2, field


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original", "unit_rms_norm"])
def test_a_copied_model_follows_its_source_under_muon(adjust_lr_fn: Any) -> None:
    """50 steps to rounding, with an eps that matters; every factor is needed but those of 1."""
    rule = MuonRule(adjust_lr_fn)
    adam = Adam(lr=2e-3, eps=1e-2, weight_decay=1.0, clipping=0.2, matrices=rule)
    found = replace(case(SOURCE, times(SOURCE, 2, 1, 3), operator="mup_copy"), matrices=rule)
    assert diverged(found, adam=adam, steps=50) <= 1e-12
    assert diverged(found, transported=False, adam=adam) > 1e-3
    plan = parameter_plan(found.target, 1, rule)
    scales = found.growth.scales
    for field in ("lr", "weight_decay", "eps", "norm"):
        without = {
            name: replace(scale, **{field: 1.0}) if plan[name].rule == rule else scale
            for name, scale in scales.items()
        }
        same = without == scales
        assert same == (adjust_lr_fn == "unit_rms_norm" and field in ("lr", "weight_decay"))
        assert same or diverged(found, scales=without, adam=adam) > 1e-4, field


def test_no_factors_where_a_growth_can_not_be_followed() -> None:
    deeper = case(SOURCE, {"num_hidden_layers": 4}, operator="zero_depth")
    both = case(
        SOURCE, times(SOURCE, 2, 1, 1) | {"num_hidden_layers": 4}, operator=["zero_depth", "lemon"]
    )
    padded = case(SOURCE, {"hidden_size": 9}, operator="zero_width")
    uneven = case(SOURCE, times(SOURCE, 2, 1, 1), operator="direct_width", copy_split="uneven")
    staged = case(SOURCE, times(SOURCE, 2, 2, 2), operator="staged_width")
    for found in (deeper, both, padded, uneven, staged):
        assert not found.growth.scales


def separation(found: Case) -> float:
    """Return the distance between the halves of a doubled model after some steps of training.

    It is the change of a matrix if its neighbouring copies are exchanged.
    """
    new = grown(trained_source(found.source), found.growth, found.target)
    step = BEFORE if found.growth.keeps_step else 0
    after = trained(found.target, new, random_batches(found.source, AFTER, seed=1000), step)
    gate = after["model.layers.0.mlp.gate_proj.weight"]["fp32"]
    exchanged = gate.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    exchanged = exchanged.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    return (gate - exchanged).abs().max().item()


LOCKED: list[dict[str, Any]] = [
    {"optimizer_state": "transport"},
    {"optimizer_state": "reset"},
    {"optimizer_state": "keep_second_moment"},
    {"operator": "staged_width"},
]
BREAKERS: list[dict[str, Any]] = [
    {"noise": 0.5},
    {"optimizer_state": "asymmetric"},
    {"optimizer_state": "estimate_second_moment"},
    {"copy_split": "uneven"},
    {"operator": "staged_width", "noise": 0.5},
]


@pytest.mark.parametrize("options", LOCKED, ids=str)
def test_copies_stay_the_same_as_long_as_nothing_parts_them(options: dict[str, Any]) -> None:
    found = case(SOURCE, times(SOURCE, 2, 2, 2), **{"operator": "direct_width"} | options)
    assert separation(found) <= 1e-12


@pytest.mark.parametrize("options", BREAKERS, ids=str)
def test_each_breaker_parts_them(options: dict[str, Any]) -> None:
    found = case(SOURCE, times(SOURCE, 2, 2, 2), **{"operator": "direct_width"} | options)
    assert separation(found) > 1e-4
