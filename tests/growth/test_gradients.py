"""Gradients and Adam's moments of grown models follow from those of their sources, by the map."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import OperatorName
from megagrow.growth.lifts import copied, product, unchanged
from megagrow.growth.map import Gather
from megagrow.growth.operators import OPERATORS
from tests.helpers.growth.building import by_lifts
from tests.helpers.growth.cases import EXACT, Case, case, cases, sources, times
from tests.helpers.growth.computing import difference, random_moments
from tests.helpers.growth.moments import MOMENTS, reached, worst_moment
from tests.helpers.hugging_face import tiny
from tools.docs.operators.dense_growth import grown
from tools.docs.operators.reference_training import (
    gradients,
    grown_weights,
    loss,
    random_ids,
    random_weights,
)

TOLERANCE = 1e-10

few = settings(max_examples=12, deadline=None)

LAWFUL: dict[OperatorName, dict[str, Any]] = {
    "direct_width": {"copy_split": "even", "noise": None},
    "mup_copy": {},
    "bert2bert_fpi": {},
    "net2net_width": {},
    "staged_width": {},
    "hypercloning": {"noise": 0.0},
    "lemon": {"noise": 0.0},
    "zero_width": {},
    "head_dim": {},
    "zero_depth": {},
    "llama_pro": {},
}
"""By operator the options with which gradients follow the law of the lifts exactly."""


@pytest.mark.parametrize("name", EXACT)
@few
@given(st.data())
def test_the_chain_rule(name: OperatorName, data: st.DataObject) -> None:
    """The source's gradient is the grown model's, pulled back through the map."""
    found = data.draw(cases(name))
    before, ids = random_weights(found.source), random_ids(found.source)
    leaves = {name: w.clone().requires_grad_() for name, w in before.items()}
    lost = loss(found.target, grown_weights(found, leaves), ids)
    pulled = torch.autograd.grad(lost, list(leaves.values()))
    expected = gradients(found.source, before, ids)
    for (parameter, gradient), other in zip(expected.items(), pulled, strict=True):
        assert (gradient - other).abs().max() <= TOLERANCE, parameter


@pytest.mark.parametrize("name", LAWFUL)
@few
@given(st.data())
def test_moments_are_those_that_the_grown_model_would_have(
    name: OperatorName, data: st.DataObject
) -> None:
    """By the real gradients of both; they are linear in them, and so the law holds of those."""
    found = data.draw(cases(name, **LAWFUL[name]))
    assert worst_moment(found) <= TOLERANCE
    for parameter, mask in reached(found).items():
        layer = parameter.split(".")[2] if ".layers." in parameter else ""
        silent = layer and not found.growth.weights[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert mask.any() == (not silent), "all but silent layers carry moments on"


@few
@given(st.data(), st.sampled_from(("zero_width", "direct_width", "staged_width")))
def test_moments_of_depth_and_width_together(data: st.DataObject, wider: OperatorName) -> None:
    found = data.draw(cases("zero_depth", wider, **LAWFUL[wider]))
    assert worst_moment(found) <= TOLERANCE


@few
@given(sources(), st.integers(1, 3), st.integers(1, 3))
def test_uneven_shares_of_groups_and_neurons(source: Any, groups: int, ffn: int) -> None:
    target = times(source, 1, groups, ffn)
    assert (
        worst_moment(case(source, target, operator="direct_width", copy_split="uneven"))
        <= TOLERANCE
    )


@few
@given(st.data())
def test_new_blocks_of_zero_depth_get_gradients_in_their_last_projections_only(data: Any) -> None:
    found = data.draw(cases("zero_depth"))
    after = grown_weights(found, random_weights(found.source))
    for name, gradient in gradients(found.target, after, random_ids(found.source)).items():
        if found.growth.fresh[name].whole:
            assert bool(gradient.any()) == ("o_proj" in name or "down_proj" in name), name


@few
@given(st.one_of(cases("isometric"), cases("zero_depth", "isometric")))
def test_what_an_isometric_growth_reads_and_writes(found: Case) -> None:
    """Readers' gradients are the map's; of writers it has the part that the source can express."""
    before, ids = random_weights(found.source), random_ids(found.source)
    old = gradients(found.source, before, ids)
    new = gradients(found.target, grown_weights(found, before), ids)
    state = {n: {"fp32": before[n], "exp_avg": g} for n, g in old.items()}
    transported = grown(state, found.growth, found.target, ("exp_avg",))
    for name, terms in found.growth.moments.items():
        made = transported[name]["exp_avg"]
        if not terms:
            assert name.endswith("norm.weight") or found.growth.fresh[name].whole
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            left = torch.from_numpy(terms[0].left)
            assert (left.T @ (new[name] - made)).abs().max() <= TOLERANCE, name
        elif name.endswith("embed_tokens.weight"):
            right = torch.from_numpy(terms[0].right)
            assert ((new[name] - made) @ right).abs().max() <= TOLERANCE, name
        else:
            assert (new[name] - made).abs().max() <= TOLERANCE, name


def test_copied_queries_stay_with_the_copies_of_their_group() -> None:
    """Heads that are copied one by one compute the same, but their moments would be wrong."""
    source = tiny(num_key_value_heads=2)
    target = source.model_copy(update={"num_key_value_heads": 4, "num_attention_heads": 8})
    heads, keys = unchanged(8), product(copied(2, 4), unchanged(8))
    whole = product(copied(2, 4), unchanged(16))
    single = product(copied(4, 8), heads)
    right, wrong = (
        by_lifts(source, target, {"query": q, "mixed": q, "key": keys, "value": keys})
        for q in (whole, single)
    )
    assert difference(right) <= TOLERANCE and difference(wrong) <= TOLERANCE
    assert worst_moment(right) <= TOLERANCE
    assert worst_moment(wrong) > 1e-6


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=8, deadline=None)
@given(st.data(), st.floats(-3, 3))
def test_moments_move_linearly_and_second_ones_by_squares(
    name: OperatorName, data: st.DataObject, factor: float
) -> None:
    """If each number has one origin, exp_avg_sq stays the square of exp_avg if it was."""
    found = data.draw(cases(name, optimizer_state="transport"))
    gain = random_weights(found.source)
    one, other = (random_weights(found.source, seed) for seed in (1, 2))
    mixed = {n: factor * one[n] + other[n] for n in one}
    a, b, both = (
        grown(
            {n: {"fp32": gain[n], "exp_avg": t[n], "exp_avg_sq": t[n] ** 2} for n in t},
            found.growth,
            found.target,
            MOMENTS,
        )
        for t in (one, other, mixed)
    )
    for parameter, kinds in both.items():
        expected = factor * a[parameter]["exp_avg"] + b[parameter]["exp_avg"]
        assert torch.allclose(expected, kinds["exp_avg"], rtol=1e-12, atol=1e-12), parameter
        assert (kinds["exp_avg_sq"] >= 0).all()
        if all(isinstance(term, Gather) for term in found.growth.moments[parameter]):
            squared = kinds["exp_avg"] ** 2
            assert torch.allclose(kinds["exp_avg_sq"], squared, rtol=1e-14, atol=0), parameter


@few
@given(sources(), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2)))
def test_by_powers_of_two_it_is_exact(source: Any, residual: int, groups: int, ffn: int) -> None:
    """m' = copies of m / k_out and v' = copies of v / k_out^2, to the bit."""
    found = case(source, times(source, residual, groups, ffn), operator="direct_width")
    state = random_moments(source)
    made = grown(state, found.growth, found.target)
    for name, kinds in made.items():
        (term,) = found.growth.weights[name]
        index = [
            torch.from_numpy(np.arange(size) if axis.index is None else axis.index)
            for axis, size in zip((term.rows, term.cols), kinds["fp32"].shape, strict=True)
        ]
        scale = found.growth.scales[name]
        for kind, factor in (
            ("fp32", scale.lr),
            ("exp_avg", scale.eps),
            ("exp_avg_sq", scale.eps**2),
        ):
            copies = state[name][kind][index[0]][:, index[1]]
            assert torch.equal(kinds[kind], copies * factor), (name, kind)
