"""Depthwise growth: which layer every new layer is a copy of, and which are silent."""

from typing import Any

import pytest

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.depth import PARTIAL_STACKS, Layer, listed_layers, stacked_layers
from megagrow.growth.map import Gather, GrowthMap
from megagrow.growth.map_checks import check_map
from megagrow.growth.operators import growth_map, resolve_operators
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.hugging_face import tiny

SOURCE = tiny(num_hidden_layers=3)


def growth(depth: int, source: ModelConfig = SOURCE, **options: Any) -> GrowthMap:
    target = source.model_copy(update={"num_hidden_layers": depth})
    return growth_map(source, target, GrowthConfig(**options))


def layers(operator: str, old: int, new: int, **options: Any) -> list[Layer]:
    source, target = tiny(num_hidden_layers=old), tiny(num_hidden_layers=new)
    chosen = GrowthConfig(operator=operator, **options)
    return list(resolve_operators(source, target, chosen, "").depth.layers)


def origins(operator: str, old: int, new: int, **options: Any) -> list[int | None]:
    return [layer.source for layer in layers(operator, old, new, **options)]


def layers_of(found: GrowthMap, part: str) -> list[int]:
    """For each new layer, in order, the layer that this part of it comes from."""
    taken = {
        int(name.split(".")[2]): int(term.source.split(".")[2])
        for name, (term,) in found.weights.items()
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
    "chosen",
    [[0, 0, 1, 1, 2, 2], [0, 1, 1, 2], [2, 1, 0], [2], [0, 1, 2, 0, 1, 2, 1, 2]],
    ids=["interpolation", "partial", "reversed", "one", "partial stack"],
)
def test_any_list_of_layers(chosen):
    found = growth(len(chosen), layer_map=chosen)
    for part in PARTS:
        assert layers_of(found, part) == chosen
    assert found.provenance == tuple(chosen)
    assert not found.preserves_function


def test_twelve_layers_do_not_mix_up_their_numbers():
    # Layer 1 and layer 11 share a digit.
    source = tiny(num_hidden_layers=12)
    chosen = [*range(12), *range(11, -1, -1)]
    assert layers_of(growth(24, source, layer_map=chosen), "o_proj") == chosen


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_parameter_comes_from_its_like(tied):
    source = tiny(num_hidden_layers=3, tie_word_embeddings=tied)
    found = growth(6, source, optimizer_state="transport")
    plan = parameter_plan(source.model_copy(update={"num_hidden_layers": 6}), tp=1)
    assert found.weights.keys() == plan.keys()
    check_map(found, parameter_plan(source, tp=1), plan)
    for name, (term,) in found.weights.items():
        assert isinstance(term, Gather)
        assert term.rows.unchanged and term.cols.unchanged, "whole tensors, unscaled"
        assert found.moments[name] == (term,)
        if plan[name].layer is None:
            assert term.source == name
        else:
            assert term.source.split(".")[3:] == name.split(".")[3:]


def test_the_same_stack_preserves_the_function():
    assert growth(3).preserves_function
    assert not growth(6).preserves_function


def test_stacked_layers_may_end_within_a_stack():
    assert stacked_layers(3, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_one_layer_grows_to_all():
    assert origins("direct_depth", 1, 24) == [0] * 24


def test_interpolation_repeats_layers_in_place():
    assert origins("direct_depth", 3, 6, layer_map="interpolate") == [0, 0, 1, 1, 2, 2]
    assert origins("direct_depth", 2, 5, layer_map="interpolate") == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("123456x4", [0, 1, 2, 3, 4, 5] * 4),
        ("12-3456x5-56", [0, 1, *[2, 3, 4, 5] * 5, 4, 5]),
        ("12-345x7-6", [0, 1, *[2, 3, 4] * 7, 5]),
        ("123-456x7", [0, 1, 2, *[3, 4, 5] * 7]),
        ("1234-56x10", [0, 1, 2, 3, *[4, 5] * 10]),
        ("12-34x10-56", [0, 1, *[2, 3] * 10, 4, 5]),
        ("1-234x7-56", [0, *[1, 2, 3] * 7, 4, 5]),
        ("123x7-456", [*[0, 1, 2] * 7, 3, 4, 5]),
    ],
)
def test_the_partial_stacks_of_the_paper(name, expected):
    assert name in PARTIAL_STACKS and len(expected) == 24
    assert origins("direct_depth", 6, 24, layer_map=name) == expected


@pytest.mark.parametrize("text", ["", "stacked", "12x", "0", "1-x2", "12--3"])
def test_what_is_no_partial_stack(text):
    assert listed_layers(text) is None


def test_new_layers_of_zero_depth_are_silent_copies_of_the_one_below():
    assert layers("zero_depth", 2, 4) == [
        Layer(0),
        Layer(0, silent=True, fresh=True),
        Layer(1),
        Layer(1, silent=True, fresh=True),
    ]


def test_or_begin_with_initial_weights():
    new = Layer(None, silent=True, fresh=True)
    assert layers("zero_depth", 2, 4, new_layer_init="random") == [Layer(0), new, Layer(1), new]


@pytest.mark.parametrize(
    ("layers", "exact"),
    [
        ([0, 0, 1, 0, 2], True),
        ([0, 1, 2], True),
        ([0, 1, 1], False),
        ([1, 0, 2], False),
        ([0, 2, 2, 1], False),
    ],
)
def test_zero_depth_is_exact_only_with_all_layers_in_order(layers, exact):
    found = growth(len(layers), operator="zero_depth", layer_map=layers)
    assert found.preserves_function == exact


def test_new_layers_of_random_depth_stand_on_top():
    new = Layer(None, fresh=True)
    assert layers("random_depth", 2, 4) == [Layer(0), Layer(1), new, new]
    assert layers("random_depth", 0, 3) == [new] * 3


@pytest.mark.parametrize("listed", ["interpolate", [0, -1, 1, -1], [0, 0, 1, 0]], ids=str)
def test_new_layers_of_random_depth_are_placed_by_the_layer_map(listed):
    new = Layer(None, fresh=True)
    assert layers("random_depth", 2, 4, layer_map=listed) == [Layer(0), new, Layer(1), new]


def test_lists_contain_new_layers():
    new = Layer(None, fresh=True)
    assert layers("direct_depth", 2, 4, layer_map=[-1, 0, 1, 1])[0] == new
    found = growth(5, operator="zero_depth", layer_map=[-1, 0, -1, 1, 2])
    assert found.preserves_function and found.provenance == (-1, 0, -1, 1, 2)


def test_random_layers_without_masks_change_the_function():
    assert growth(4, operator="random_depth").preserves_function
    assert not growth(4, operator="random_depth", ramp_tokens=0).preserves_function


def test_solar_leaves_out_the_middle_seam():
    # The paper's own: 32 layers, 8 left out at each side of the seam, 48 layers.
    assert origins("solar", 32, 48) == [*range(24), *range(8, 32)]


def test_llama_pro_puts_a_silent_copy_behind_every_group():
    found = layers("llama_pro", 8, 10)
    assert [layer.source for layer in found] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
    assert [index for index, layer in enumerate(found) if layer.silent] == [4, 9]


def test_mslt_repeats_the_top():
    assert origins("mslt", 6, 9) == [0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_midas_repeats_the_middle_block():
    assert origins("midas", 12, 16) == [*range(8), *range(4, 12)]
    assert origins("midas", 4, 6) == [0, 1, 0, 1, 2, 3]


def test_lidas_inserts_the_halves_around_the_seam():
    assert origins("lidas", 12, 16) == [*range(8), 6, 7, 8, 9, *range(8, 12)]


def test_of_several_copies_the_first_is_old():
    assert [layer.fresh for layer in layers("direct_depth", 2, 6)] == [False] * 2 + [True] * 4
