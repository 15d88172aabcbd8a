"""Adam's moments under each policy, for every operator."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import GrowthConfig, OperatorName, StatePolicy
from megagrow.growth.map import Fresh
from megagrow.growth.operators import OPERATORS, state_policy
from tests.helpers.growth.cases import Case, cases
from tests.helpers.growth.computing import random_moments
from tools.docs.operators.dense_growth import State, grown

MOMENTS = ("exp_avg", "exp_avg_sq")


def old_entries(new: Fresh, shape: torch.Size) -> torch.Tensor:
    """(rows, cols) booleans: what a growth has not made."""
    old = torch.full(shape, not new.whole)
    for mask, view in ((new.rows, (-1, 1)), (new.cols, (1, -1))):
        if mask is not None:
            old = old & ~torch.from_numpy(mask).view(view)
    return old


def moments_by(policy: StatePolicy, found: Case) -> tuple[State, Case]:
    options = found.options.model_copy(update={"optimizer_state": policy})
    chosen = Case(found.source, found.target, options)
    state = random_moments(found.source)
    return grown(state, chosen.growth, found.target, MOMENTS), chosen


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=5, deadline=None)
@given(st.data())
def test_what_moves_by_each_policy(name: OperatorName, data: st.DataObject) -> None:
    found = data.draw(cases(name))
    transported, _ = moments_by("transport", found)
    for policy in get_args(StatePolicy):
        made, chosen = moments_by(policy, found)
        for parameter, kinds in made.items():
            moved = {kind: transported[parameter][kind] for kind in MOMENTS}
            if policy in ("asymmetric", "estimate_second_moment"):
                new = chosen.growth.fresh[parameter]
                moved = {k: t * old_entries(new, t.shape) for k, t in moved.items()}
            if policy in ("keep_second_moment", "reset"):
                moved["exp_avg"] = torch.zeros_like(moved["exp_avg"])
            if policy == "reset":
                moved["exp_avg_sq"] = torch.zeros_like(moved["exp_avg_sq"])
            for kind, tensor in moved.items():
                assert torch.equal(kinds[kind], tensor), (policy, parameter, kind)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(("zero_width", "zero_depth", "lemon", "direct_width")))
def test_what_is_old_is_the_size_of_the_source(data: st.DataObject, name: OperatorName) -> None:
    """Every number of the source goes on in exactly one old entry."""
    found = data.draw(cases(name))
    new = found.growth.fresh
    sizes = {n: w["fp32"].shape for n, w in random_moments(found.target).items()}
    old = sum(int(old_entries(new[name], shape).sum()) for name, shape in sizes.items())
    assert old == sum(w["fp32"].numel() for w in random_moments(found.source).values())


def test_the_default_is_that_of_the_operator_that_keeps_least() -> None:
    def policy(*operators: OperatorName, **options: StatePolicy) -> StatePolicy:
        return state_policy(GrowthConfig(operator=list(operators), **options))

    assert policy("direct_depth") == "asymmetric"
    assert policy("direct_width") == "transport"
    assert policy("sparkling") == policy("direct_depth", "sparkling") == "asymmetric"
    assert policy("learn_width", "learn_depth") == "reset"
    assert policy("sparkling", optimizer_state="keep_second_moment") == "keep_second_moment"
