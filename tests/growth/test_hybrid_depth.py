"""Depth growth of Samba hybrids: every layer keeps its type."""

from typing import Any

import pytest

from megagrow.config.growth import GrowthConfig, OperatorName
from megagrow.growth.constraints import Event
from megagrow.growth.map_checks import check_map
from megagrow.growth.operators import resolve_operators
from megagrow.growth.validation import event_problems
from megagrow.model.masks import masks_at
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.growth.cases import Sizes, case
from tests.helpers.growth.computing import difference
from tests.helpers.growth.events import B, H
from tests.helpers.growth.moments import worst_moment
from tests.helpers.model.samba_reference import samba
from tools.docs.operators.reference_training import (
    grown_weights,
    logits,
    random_ids,
    random_weights,
)

SOURCE = samba(hidden_size=8, num_key_value_heads=2, vocab_size=11, rms_norm_eps=0.3)
KEPT = f"choose layers or {H}.model.layer_types that keep the type of every layer"


def origins(name: OperatorName, old: int, new: int, **options: Any) -> list[int | None]:
    source, target = (SOURCE.model_copy(update={"num_hidden_layers": n}) for n in (old, new))
    chosen = GrowthConfig(operator=name, **options)
    assert event_problems(Event(source, target, chosen, B, H)) == []
    depth = resolve_operators(source, target, chosen, "").depth
    return [layer.source for layer in depth.layers]


def problems(old: int, target: Sizes, **options: Any) -> list[str]:
    source = SOURCE.model_copy(update={"num_hidden_layers": old})
    event = Event(source, source.model_copy(update=target), GrowthConfig(**options), B, H)
    return event_problems(event)


def layers(count: int) -> Sizes:
    return {"num_hidden_layers": count}


def test_stacks_and_lists_of_periods() -> None:
    assert origins("direct_depth", 4, 12) == [0, 1, 2, 3] * 3
    assert origins("direct_depth", 4, 8, layer_map="interpolate") == [0, 1, 0, 1, 2, 3, 2, 3]
    assert origins("direct_depth", 4, 8, layer_map="12-34x3") == [0, 1, 2, 3, 2, 3, 2, 3]
    assert origins("direct_depth", 4, 6, layer_map=[2, 3, 0, 1, 0, 3]) == [2, 3, 0, 1, 0, 3]
    assert origins("zero_depth", 4, 8) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert origins("learn_depth", 4, 6) == [0, 1, 0, 1, 2, 3]
    assert origins("random_depth", 4, 6) == [0, 1, 2, 3, None, None]


def test_operators_that_repeat_complete_periods() -> None:
    assert origins("solar", 4, 4) == [0, 1, 2, 3]
    assert origins("solar", 8, 12) == [*range(6), *range(2, 8)]
    assert origins("mslt", 4, 6) == [0, 1, 2, 3, 2, 3]
    assert origins("midas", 4, 6) == [0, 1, 0, 1, 2, 3]
    assert origins("midas", 8, 12) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert origins("llama_pro", 4, 8) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert origins("llama_pro", 4, 6) == [0, 1, 2, 3, 2, 3]
    assert origins("lidas", 8, 12) == [*range(4), *range(2, 6), *range(4, 8)]


MIXED: list[tuple[int, int, dict[str, Any], tuple[int, str, int, str]]] = [
    (4, 8, {"layer_map": [0, 1, 1, 0, 2, 3, 2, 3]}, (1, "sliding_attention", 2, "mamba")),
    (4, 8, {"layer_map": "12-4x6"}, (3, "sliding_attention", 2, "mamba")),
    (4, 6, {"operator": "lidas"}, (1, "sliding_attention", 2, "mamba")),
]
"""Layers of the source, of the target, options, and the first layer of another type."""


@pytest.mark.parametrize(("old", "new", "options", "first"), MIXED, ids=str)
def test_another_type_is_refused_in_one_line(
    old: int, new: int, options: dict[str, Any], first: tuple[int, str, int, str]
) -> None:
    name = options.get("operator", "direct_depth")
    layer, before, index, after = first
    assert problems(old, layers(new), **options) == [
        f"{H}: {name} would copy layer {layer} of {B} ({before}) to layer {index} ({after}); {KEPT}"
    ]


GROUPED = {"num_hidden_layers": 8, "layer_types": [*["mamba"] * 2, *["sliding_attention"] * 2]}
"""Two layers of each type in turn."""

TYPES: list[tuple[Sizes, str]] = [
    (
        layers(8) | {"layer_types": ["sliding_attention", "mamba"]},
        f"{H}: direct_depth would copy layer 0 of {B} (mamba) to layer 0 (sliding_attention); "
        f"{KEPT}",
    ),
    (
        layers(8) | {"layer_types": ["mamba", "full_attention"]},
        f"{H}.model has layers of full_attention and mamba, {B} of mamba and sliding_attention; "
        "growth keeps the type of every layer",
    ),
]


@pytest.mark.parametrize(("target", "message"), TYPES, ids=["order", "other types"])
def test_types_of_the_target_are_those_of_the_copies(target: Sizes, message: str) -> None:
    assert problems(4, target) == [message]
    assert problems(4, GROUPED, layer_map=[0, 2, 1, 3, 2, 0, 3, 1]) == []


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("zero_depth", layers(12), {}),
        ("zero_depth", layers(8), {"new_layer_init": "random"}),
        ("zero_depth", GROUPED, {}),
        ("llama_pro", layers(6), {}),
        ("llama_pro", GROUPED, {}),
        ("learn_depth", layers(6), {}),
    ],
    ids=str,
)
def test_silent_layers_change_no_bit(
    name: OperatorName, target: Sizes, options: dict[str, Any]
) -> None:
    found = case(SOURCE, target, operator=name, **options)
    assert found.growth.preserves_function
    assert difference(found) == 0.0


@pytest.mark.parametrize(
    ("name", "target"),
    [("zero_depth", layers(12)), ("zero_depth", GROUPED), ("llama_pro", GROUPED)],
    ids=str,
)
def test_moments_of_old_layers_are_kept(name: OperatorName, target: Sizes) -> None:
    found = case(SOURCE, target, operator=name)
    assert worst_moment(found) <= 1e-10


def test_silent_layers_have_zeros_in_their_last_projections_only() -> None:
    found = case(SOURCE, layers(8), operator="zero_depth")
    zero = {name for name, w in grown_weights(found, random_weights(SOURCE)).items() if not w.any()}
    last = {2: "mamba.out_proj", 3: "self_attn.o_proj", 6: "mamba.out_proj", 7: "self_attn.o_proj"}
    names = [name for layer in last.items() for name in (layer, (layer[0], "mlp.down_proj"))]
    assert zero == {f"model.layers.{layer}.{name}.weight" for layer, name in names}


def test_random_layers_behind_masks_of_0_are_no_layers() -> None:
    found = case(SOURCE, layers(8), operator="random_depth")
    before, ids = random_weights(SOURCE), random_ids(SOURCE)
    old, after = logits(SOURCE, before, ids), grown_weights(found, before)
    masks = [masks_at(SOURCE, found.target, tokens, 100) for tokens in (0, 50)]
    assert found.growth.preserves_function
    assert (logits(found.target, after, ids, masks=masks[0]) - old).abs().max() <= 1e-12
    assert (logits(found.target, after, ids, masks=masks[1]) - old).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["direct_depth", "solar", "mslt", "midas"])
def test_stacks_change_the_function_and_copy_complete_tensors(name: OperatorName) -> None:
    found = case(SOURCE, layers(8), operator=name)
    assert not found.growth.preserves_function
    assert difference(found) > 1e-2
    check_map(found.growth, parameter_plan(SOURCE, 1), parameter_plan(found.target, 1))
    for parameter, (term,) in found.growth.weights.items():
        assert term.rows.unchanged and term.cols.unchanged
        assert term.source.split(".")[3:] == parameter.split(".")[3:]
