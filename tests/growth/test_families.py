"""Growth of each family: what preserves the function in fp64, its moments, and what is refused."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.growth.constraints import Event
from megagrow.growth.validation import event_problems
from tests.growth.test_gradients import LAWFUL, worst_moment
from tests.helpers.families import of_family
from tests.helpers.growth.cases import Case, case, cases, times, widened
from tests.helpers.growth.computing import difference
from tools.docs.operators.reference_training import (
    apart,
    gradients,
    grown_weights,
    random_ids,
    random_weights,
)

TOLERANCE = 1e-10
FAILS = 1e-4

few = settings(max_examples=6, deadline=None)

SMALL = {"hidden_size": 8, "head_dim": 4, "intermediate_size": 6, "vocab_size": 11}
FAMILIES = ("qwen2", "qwen3", "olmo2")
PRE_NORM = ("qwen2", "qwen3")


def source(name: str, **changes: Any) -> Any:
    """A small model with a large epsilon, so that an error in it shows."""
    full = {"sliding_window": None, "layer_types": ["full_attention"]} if name == "qwen2" else {}
    return of_family(name, **{"rms_norm_eps": 0.3} | SMALL | full | changes)


def grown_case(name: OperatorName, old: Any) -> Case:
    """A growth that keeps the heads, by sizes that are no multiples where the operator can."""
    sizes: dict[OperatorName, dict[str, Any]] = {
        "direct_width": times(old, 2, 2, 2),
        "zero_width": widened(old, 13, 2, 9),
        "lemon": widened(old, 13, 2, 9),
        "isometric": {"hidden_size": 13},
        "staged_width": times(old, 2, 2, 2),
        "zero_depth": {"num_hidden_layers": 4},
        "llama_pro": {"num_hidden_layers": 4},
    }
    return case(old, sizes[name], operator=name, **LAWFUL.get(name, {}))


BITWISE = ("zero_depth", "llama_pro")
EXACT = ("direct_width", "zero_width", "lemon", "staged_width", *BITWISE)
CASES = [(name, operator) for name in FAMILIES for operator in EXACT]
CASES += [(name, "isometric") for name in PRE_NORM]


TIED = [(name, operator, True) for name, operator in CASES if operator != "isometric"]


@pytest.mark.parametrize(
    ("name", "operator", "tied"), [*((*which, False) for which in CASES), *TIED]
)
def test_the_function_is_preserved(name, operator, tied):
    found = grown_case(operator, source(name, tie_word_embeddings=tied))
    assert found.growth.preserves_function
    assert difference(found) <= (0.0 if operator in BITWISE else TOLERANCE)


@pytest.mark.parametrize(("name", "operator"), [(name, op) for name, op in CASES if op in LAWFUL])
def test_moments_are_those_that_the_grown_model_would_have(name, operator):
    assert worst_moment(grown_case(operator, source(name))) <= TOLERANCE


@few
@given(st.data(), st.sampled_from(("direct_width", "zero_width", "lemon", "hypercloning")))
@pytest.mark.parametrize("name", PRE_NORM)
def test_any_width_of_families_with_norms_first(name: str, data: st.DataObject, wider: Any) -> None:
    """Heads of Qwen may grow by any number of groups."""
    tied = data.draw(st.booleans())
    found = data.draw(cases(wider, source=source(name, tie_word_embeddings=tied)))
    assert difference(found) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_depth_and_width_in_one_event(name):
    old = source(name)
    sizes = {"num_hidden_layers": 4} | times(old, 2, 2, 3)
    operators = ["zero_depth", "direct_width"]
    found = case(old, sizes, operator=operators, exact_continuation=False)
    assert difference(found) <= TOLERANCE
    assert worst_moment(found) <= TOLERANCE


@pytest.mark.parametrize("operator", ["zero_width", "lemon", "isometric"])
def test_the_norms_of_queries_and_keys_follow_eps(operator):
    """eps follows the residual stream: without the factor on q_proj and k_proj, it is wrong."""
    found = grown_case(operator, source("qwen3"))
    before = random_weights(found.source)
    factor = (found.source.hidden_size / found.target.hidden_size) ** 0.5
    scaled = {
        name: w / factor if name.endswith(("q_proj.weight", "k_proj.weight")) else w
        for name, w in before.items()
    }
    assert difference(found, before) <= TOLERANCE
    assert apart(found, before, grown_weights(found, scaled), random_ids(found.source)) > FAILS


@pytest.mark.parametrize("silent", BITWISE)
def test_silent_layers_of_olmo2_get_gradients_in_the_gains_of_their_norms_only(silent):
    found = grown_case(silent, source("olmo2"))
    after = grown_weights(found, random_weights(found.source))
    gains = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    new = {name for name, fresh in found.growth.fresh.items() if fresh.whole}
    assert new and all(not after[name].any() for name in new if name.endswith(gains))
    for name, gradient in gradients(found.target, after, random_ids(found.source)).items():
        if name in new:
            assert bool(gradient.any()) == name.endswith(gains), name


REFUSED = [
    ("olmo2", "zero_width", {"heads": 3}, "changes the mean square of qk_norm = full_width"),
    ("olmo2", "direct_width", {"heads": 3}, "changes the mean square of qk_norm = full_width"),
    ("olmo2", "isometric", {"hidden_size": 13}, "norm_position = post is not supported by iso"),
    ("olmo2", "head_dim", {"head_dim": 8}, "qk_norm = full_width is not supported by head_dim"),
    ("qwen3", "head_dim", {"head_dim": 8}, "qk_norm = per_head is not supported by head_dim"),
]


@pytest.mark.parametrize(("name", "operator", "sizes", "message"), REFUSED)
def test_growths_that_would_change_the_function_are_refused(name, operator, sizes, message):
    old = source(name, rms_norm_eps=1e-5)
    if "heads" in sizes:
        sizes = widened(old, 8, sizes["heads"], 6)
    event = Event(old, old.model_copy(update=sizes), GrowthConfig(operator=operator), "b", "h")
    (problem,) = event_problems(event)
    assert message in problem
