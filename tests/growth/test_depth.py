"""Depthwise growth: which layer every new layer is a copy of, and maps that are refused."""

from typing import Any

import pytest

from megagrow.config.schema import GrowthConfig, ModelConfig
from megagrow.growth.depth import stacked_layers
from megagrow.growth.map import Axis, Gather, GrowthMap, identity_map
from megagrow.growth.operators import growth_map
from megagrow.parallel.plan import parameter_plan
from tests.hugging_face import tiny

SOURCE = tiny(num_hidden_layers=3)


def growth(depth: int, source: ModelConfig = SOURCE, **options: Any) -> GrowthMap:
    target = source.model_copy(update={"num_hidden_layers": depth})
    return growth_map(source, target, GrowthConfig(**options))


def layers_of(found: GrowthMap, part: str) -> list[int]:
    """For each new layer, in order, the layer that this part of it comes from."""
    taken = {
        int(name.split(".")[2]): int(term.source.split(".")[2])
        for name, term in found.terms.items()
        if part in name
    }
    return [taken[layer] for layer in range(len(taken))]


PARTS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("input_layernorm", "post_attention_layernorm"),
)


@pytest.mark.parametrize("part", PARTS)
def test_by_default_the_whole_stack_is_repeated(part):
    found = growth(12)
    assert layers_of(found, part) == [0, 1, 2] * 4
    assert found.provenance == (0, 1, 2) * 4


@pytest.mark.parametrize(
    "layers",
    [[0, 0, 1, 1, 2, 2], [0, 1, 1, 2], [2, 1, 0], [2], [0, 1, 2, 0, 1, 2, 1, 2]],
    ids=["interpolation", "partial", "reversed", "one", "partial stack"],
)
def test_any_list_of_layers(layers):
    found = growth(len(layers), layers=layers)
    for part in PARTS:
        assert layers_of(found, part) == layers
    assert found.provenance == tuple(layers)
    assert not found.preserves_function


def test_twelve_layers_do_not_mix_up_their_numbers():
    # Layer 1 and layer 11 share a digit.
    source = tiny(num_hidden_layers=12)
    layers = [*range(12), *range(11, -1, -1)]
    assert layers_of(growth(24, source, layers=layers), "o_proj") == layers


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_parameter_comes_from_its_like(tied):
    source = tiny(num_hidden_layers=3, tie_word_embeddings=tied)
    found = growth(6, source)
    plan = parameter_plan(source.model_copy(update={"num_hidden_layers": 6}), tp=1)
    assert found.terms.keys() == plan.keys()
    found.check(list(parameter_plan(source, tp=1)), list(plan))
    for name, term in found.terms.items():
        assert term.rows == Axis() and term.cols == Axis(), "whole tensors, unscaled"
        if plan[name].layer is None:
            assert term.source == name
        else:
            assert term.source.split(".")[3:] == name.split(".")[3:]


def test_the_same_stack_preserves_the_function():
    assert growth(3).preserves_function
    assert not growth(6).preserves_function


@pytest.mark.parametrize("state", ["transport", "reset"])
def test_what_becomes_of_the_optimizer_is_told(state):
    assert growth(6, optimizer_state=state).optimizer_state == state


def test_stacked_layers_may_end_within_a_stack():
    assert stacked_layers(3, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_identity_takes_every_parameter_from_itself():
    names = list(parameter_plan(SOURCE, tp=1))
    found = identity_map(names)
    assert {name: term.source for name, term in found.terms.items()} == {n: n for n in names}
    assert found.preserves_function and found.provenance == ()
    found.check(names, names)


@pytest.mark.parametrize(
    ("terms", "problem"),
    [
        ({"a": "x"}, "the growth map says nothing of b"),
        ({"a": "x", "b": "z"}, "b is to come from z, which does not exist"),
        ({"a": "x", "b": "y", "c": "y"}, "makes c, which the target does not have"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(terms, problem):
    found = GrowthMap({name: Gather(source) for name, source in terms.items()}, "reset", False, ())
    with pytest.raises(ValueError, match=problem):
        found.check(source=["x", "y"], target=["a", "b"])
