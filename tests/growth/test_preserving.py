"""Which operators preserve the function: logits in fp64 over random sizes, and what must differ."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.growth.lifts import evenly, padded, product, unchanged
from megagrow.growth.operators import OPERATORS, resolve_operators
from tests.helpers.growth.building import by_lifts
from tests.helpers.growth.cases import (
    CHANGES,
    EXACT,
    MASKED,
    Case,
    case,
    cases,
    covers_all_operators,
    sources,
    times,
    widened,
)
from tests.helpers.growth.computing import difference
from tests.helpers.hugging_face import tiny
from tools.docs.operators.reference_training import (
    apart,
    grown_weights,
    logits,
    random_ids,
    random_weights,
)

TOLERANCE = 1e-10
FAILS = 1e-2
"""Bound that a wrong operator has to exceed, so that the tolerance proves something."""

BITWISE: tuple[OperatorName, ...] = ("zero_depth", "learn_depth", "llama_pro")
WIDE = tuple(name for name in EXACT if OPERATORS[name].wider and not OPERATORS[name].learned)

few = settings(max_examples=20, deadline=None)

SOURCE = tiny(
    num_hidden_layers=4, hidden_size=8, head_dim=4, num_key_value_heads=2, intermediate_size=6
)
LARGE_EPS = SOURCE.model_copy(update={"rms_norm_eps": 0.3})


def test_every_operator_is_looked_at() -> None:
    assert covers_all_operators()
    assert {*EXACT, *MASKED, *CHANGES, "sparkling", "vocabulary"} == OPERATORS.keys()


@pytest.mark.parametrize("name", EXACT)
@few
@given(st.data())
def test_exact_operators(name: OperatorName, data: st.DataObject) -> None:
    found = data.draw(cases(name))
    assert found.growth.preserves_function
    assert difference(found) <= (0.0 if name in BITWISE else TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(("zero_depth", "llama_pro")), st.sampled_from(WIDE))
def test_depth_and_width_in_one_event(
    data: st.DataObject, deeper: OperatorName, wider: OperatorName
) -> None:
    found = data.draw(cases(deeper, wider, source=data.draw(sources(tied=False))))
    assert found.growth.preserves_function
    assert difference(found) <= TOLERANCE


@few
@given(cases("sparkling"))
def test_sparkling_is_exact_for_whole_factors_of_copies(found: Case) -> None:
    names = ("hidden_size", "num_key_value_heads", "intermediate_size")
    whole = all(getattr(found.target, n) % getattr(found.source, n) == 0 for n in names)
    assert found.growth.preserves_function == whole
    if whole:
        assert difference(found) <= TOLERANCE


@few
@given(cases("vocabulary"))
def test_a_larger_vocabulary_keeps_the_logits_of_the_old_tokens(found: Case) -> None:
    weights, ids = random_weights(found.source), random_ids(found.source)
    old = logits(found.source, weights, ids)
    new = logits(found.target, grown_weights(found, weights), ids)
    assert (new[..., : found.source.vocab_size] - old).abs().max() <= TOLERANCE
    assert not found.growth.preserves_function, "the softmax is over more"


@pytest.mark.parametrize("names", [*[(name,) for name in MASKED], MASKED])
@few
@given(st.data())
def test_behind_masks_of_0_stands_the_source(
    names: tuple[OperatorName, ...], data: st.DataObject
) -> None:
    found = data.draw(cases(*names))
    assert found.growth.preserves_function
    assert found.target.rms_norm_eps == found.source.rms_norm_eps, "new entries do not count"
    weights = random_weights(found.source)
    old = old_parts(found, grown_weights(found, weights))
    assert old.keys() == weights.keys()
    assert all(torch.equal(old[name], weights[name]) for name in weights)


def old_parts(found: Case, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The grown model without its new layers, rows and columns."""
    out = {}
    for name, tensor in weights.items():
        new = found.growth.fresh[name]
        if not new.whole:
            for dim, mask in enumerate((new.rows, new.cols)):
                if mask is not None:
                    tensor = tensor.index_select(dim, torch.from_numpy(~mask).nonzero().ravel())
            out[name] = tensor
    return out


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_kv_head_grows_with_its_queries(tied: bool) -> None:
    source = tiny(num_key_value_heads=1, tie_word_embeddings=tied, rms_norm_eps=0.3)
    found = case(source, times(source, 2, 3, 1), operator="direct_width")
    assert found.target.num_key_value_heads == 3 and found.target.num_attention_heads == 12
    assert difference(found) <= TOLERANCE


@few
@given(st.data(), st.sampled_from(WIDE))
def test_attention_sees_distances_only(data: st.DataObject, name: OperatorName) -> None:
    """The tables of RoPE are fp32: that bounds how well a shift of positions can be undone."""
    found = data.draw(cases(name, source=data.draw(sources(tied=False))))
    after = grown_weights(found, random_weights(found.source))
    ids = random_ids(found.source)
    here, there = (logits(found.target, after, ids, first) for first in (0, 13))
    assert (here - there).abs().max() < 1e-4


OTHERWISE: list[tuple[OperatorName, dict[str, Any], dict[str, Any]]] = [
    ("direct_depth", {"num_hidden_layers": 8}, {}),
    ("solar", {"num_hidden_layers": 6}, {}),
    ("mslt", {"num_hidden_layers": 6}, {}),
    ("midas", {"num_hidden_layers": 6}, {}),
    ("lidas", {"num_hidden_layers": 6}, {}),
    ("bert2bert_aki", times(SOURCE, 2, 2, 2), {}),
    ("sparkling", widened(SOURCE, 12, 2, 6), {}),
    ("sparkling", widened(SOURCE, 16, 2, 6), {"new_layer_init": "random"}),
    ("direct_width", times(SOURCE, 2, 1, 1), {"mixing_noise": 0.2}),
    ("direct_width", times(SOURCE, 2, 1, 1), {"paper_exact": True}),
    ("direct_width", widened(SOURCE, 13, 2, 6), {"paper_exact": True}),
    ("zero_width", widened(SOURCE, 13, 2, 6), {"paper_exact": True}),
]
"""Growths that do not preserve the function."""


@pytest.mark.parametrize(("name", "target", "options"), OTHERWISE)
def test_growths_that_change_the_function_say_so_and_do(
    name: OperatorName, target: dict[str, Any], options: dict[str, Any]
) -> None:
    assert set(CHANGES) <= {operator for operator, *_ in OTHERWISE}
    found = case(SOURCE, target, operator=name, **options)
    assert not found.growth.preserves_function
    assert difference(found) > FAILS


@given(cases("direct_depth"))
@few
def test_of_lists_of_layers_only_the_old_one_is_exact(found: Case) -> None:
    same = found.growth.provenance == tuple(range(found.source.num_hidden_layers))
    assert found.growth.preserves_function == same


def test_a_tied_copy_without_its_gain_fails() -> None:
    source = SOURCE.model_copy(update={"tie_word_embeddings": True})
    found = case(source, times(source, 2, 1, 1), operator="direct_width")
    before, ids = random_weights(source), random_ids(source)
    after = grown_weights(found, before)
    assert apart(found, before, after, ids) <= TOLERANCE
    after["model.norm.weight"] = before["model.norm.weight"].repeat_interleave(2, dim=0)
    assert apart(found, before, after, ids) > FAILS


def test_without_the_rule_for_eps_it_fails() -> None:
    found = case(LARGE_EPS, {"hidden_size": 13}, operator="zero_width")
    assert difference(found) <= TOLERANCE
    kept = found.target.model_copy(update={"rms_norm_eps": LARGE_EPS.rms_norm_eps})
    assert difference(Case(LARGE_EPS, kept, found.options)) > FAILS


def repeated(size: int) -> list[int]:
    """Positions of an axis of `size`, the first one three times."""
    return [0, 0, *range(size)]


def test_uneven_copies_of_the_residual_stream_fail_and_of_other_axes_do_not() -> None:
    wider = SOURCE.model_copy(update={"hidden_size": 10})
    lift = evenly(8, np.array(repeated(8)))
    assert difference(by_lifts(SOURCE, wider, {"residual": lift})) > FAILS
    wider = SOURCE.model_copy(update={"intermediate_size": 8})
    lift = evenly(6, np.array(repeated(6)))
    assert difference(by_lifts(SOURCE, wider, {"ffn": lift})) <= TOLERANCE


def test_wider_heads_with_their_pairs_out_of_place_fail() -> None:
    wider = SOURCE.model_copy(update={"head_dim": 8})
    right = resolve_operators(SOURCE, wider, GrowthConfig(operator="head_dim"), "").width.lifts
    assert difference(by_lifts(SOURCE, wider, dict(right))) <= TOLERANCE
    beside = padded(4, 8, random_out=False, random_in=False)
    wrong = {"query": product(unchanged(4), beside), "key": product(unchanged(2), beside)}
    scaled = replace(wrong["key"], produce=np.full(16, 2**0.5))
    assert difference(by_lifts(SOURCE, wider, {**right, **wrong, "key": scaled})) > FAILS
