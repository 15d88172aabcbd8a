"""Width growth of Samba hybrids: the residual stream, heads, neurons and Mamba channels."""

from typing import Any

import pytest
import torch

from megagrow.config.growth import OperatorName
from megagrow.growth.ligo import grown_slice, initial, learned_map
from megagrow.growth.operators import OPERATORS, resolve_operators
from megagrow.model.masks import masks_at
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.growth.cases import Case, Sizes, case, times, widened
from tests.helpers.growth.computing import difference
from tests.helpers.growth.events import H, problems
from tests.helpers.growth.ligo import disturbed
from tests.helpers.growth.moments import reached, worst_moment
from tests.helpers.model.samba_reference import samba
from tools.docs.operators.reference_training import (
    grown_weights,
    logits,
    random_ids,
    random_weights,
    trajectory_difference,
)

TOLERANCE, FAILS = 1e-10, 1e-2
SOURCE = samba(
    hidden_size=8,
    head_dim=4,
    num_key_value_heads=2,
    intermediate_size=6,
    mamba_d_inner=6,
    vocab_size=11,
    rms_norm_eps=0.3,
)
UNTIED = SOURCE.model_copy(update={"tie_word_embeddings": False})
DOUBLE = times(SOURCE, 2, 2, 2) | {"mamba_d_inner": 12}
INTEGER = times(SOURCE, 2, 1, 3) | {"mamba_d_inner": 18}
CHANNELS = {"mamba_d_inner": 10}
ANY = widened(SOURCE, 13, 3, 10) | CHANNELS
COPIED = widened(SOURCE, 16, 3, 10) | CHANNELS

EXACT: list[tuple[OperatorName, Sizes, dict[str, Any]]] = [
    ("direct_width", COPIED, {}),
    ("direct_width", COPIED, {"copy_order": "tiled", "copy_split": "uneven", "noise": 3.0}),
    ("net2net_width", COPIED, {}),
    ("bert2bert_fpi", COPIED, {}),
    ("learn_width", COPIED, {}),
    ("zero_width", ANY, {}),
    ("zero_width", CHANNELS, {}),
    ("lemon", ANY, {}),
    ("lemon", CHANNELS, {}),
    ("hypercloning", INTEGER, {}),
    ("mup_copy", INTEGER, {}),
    ("sparkling", INTEGER, {}),
    ("staged_width", DOUBLE, {}),
    ("head_dim", {"head_dim": 8}, {}),
]
LAWFUL: list[tuple[OperatorName, Sizes, dict[str, Any]]] = [
    ("direct_width", COPIED, {}),
    ("net2net_width", COPIED, {}),
    ("bert2bert_fpi", COPIED, {}),
    ("zero_width", ANY, {}),
    ("lemon", ANY, {"noise": 0.0}),
    ("hypercloning", INTEGER, {"noise": 0.0}),
    ("mup_copy", INTEGER, {}),
    ("staged_width", DOUBLE, {}),
]
"""With these the moments of the grown model follow from those of its source."""

OF_CHANNELS = ("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("name", "target", "options"), EXACT, ids=str)
def test_the_function_is_preserved(
    name: OperatorName, target: Sizes, options: dict[str, Any], tied: bool
) -> None:
    found = case(SOURCE if tied else UNTIED, target, operator=name, **options)
    assert found.growth.preserves_function
    assert difference(found) <= TOLERANCE


def test_a_rotated_residual_stream_preserves_the_function() -> None:
    found = case(UNTIED, {"hidden_size": 13}, operator="isometric")
    assert found.growth.preserves_function
    assert difference(found) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bert2bert_aki", COPIED),
        ("bert2bert_fpi", ANY),
        ("sparkling", CHANNELS),
    ],
)
def test_growths_that_change_the_function_are_known(name: OperatorName, target: Sizes) -> None:
    found = case(SOURCE, target, operator=name)
    assert not found.growth.preserves_function
    assert difference(found) > FAILS


def test_copies_from_the_next_layer_are_of_the_same_type() -> None:
    found = case(SOURCE, COPIED, operator="bert2bert_aki")
    layers: dict[int, set[int]] = {0: set(), 1: set(), 2: set(), 3: set()}
    for name, terms in found.growth.weights.items():
        if ".layers." in name:
            sources = {int(term.source.split(".")[2]) for term in terms}
            layers[int(name.split(".")[2])] |= sources
    assert layers == {0: {0, 2}, 1: {1, 3}, 2: {2}, 3: {3}}


def test_all_operators_of_width_are_tested() -> None:
    tested = {name for name, *_ in EXACT} | {"isometric", "bert2bert_aki", "random_width"}
    assert tested | {"vocabulary"} == {n for n, operator in OPERATORS.items() if operator.wider}


@pytest.mark.parametrize("target", [ANY, CHANNELS], ids=["all axes", "channels"])
def test_behind_masks_of_0_is_the_source(target: Sizes) -> None:
    found = case(SOURCE, target, operator="random_width")
    before, ids = random_weights(found.source), random_ids(found.source)
    old, after = logits(found.source, before, ids), grown_weights(found, before)
    at_start, ramping = (masks_at(found.source, found.target, tokens, 100) for tokens in (0, 90))
    assert at_start is not None and at_start.inner is not None
    assert at_start.inner.tolist() == [1.0] * 6 + [0.0] * 4
    assert (logits(found.target, after, ids, masks=at_start) - old).abs().max() <= TOLERANCE
    assert (logits(found.target, after, ids, masks=ramping) - old).abs().max() > 1e-4


def test_new_channels_have_initial_values() -> None:
    found = case(SOURCE, CHANNELS, operator="zero_width")
    before = random_weights(found.source)
    after = grown_weights(found, before)
    layer = "model.layers.2.mamba."
    for name in OF_CHANNELS:
        assert torch.equal(after[layer + name][:6], before[layer + name]), name
    new = {name: after[layer + name][6:] for name in OF_CHANNELS}
    torch.testing.assert_close(new["A_log"].exp(), torch.arange(1.0, 4.0).double().expand(4, 3))
    assert (new["D"] == 1).all()
    dt = torch.nn.functional.softplus(new["dt_proj.bias"])
    assert (dt >= 0.999e-3).all() and (dt <= 0.1001).all() and len(dt.unique()) == 4
    assert 0 < new["dt_proj.weight"].abs().max() <= 2**-0.5
    assert 0 < new["conv1d.weight"].abs().max() <= 0.5
    for name in ("x_proj.weight", "out_proj.weight"):
        assert not after[layer + name][:, 6:].any(), "nothing reads new channels"


@pytest.mark.parametrize("field", ["mamba_d_state", "mamba_dt_rank", "mamba_d_conv"])
@pytest.mark.parametrize("name", ["direct_width", "zero_width", "lemon", "random_width"])
def test_other_sizes_of_mamba_do_not_grow(name: OperatorName, field: str) -> None:
    old = getattr(SOURCE, field)
    message = f"{H}.model changes {field} from {old} to {old + 1}, which {name} cannot grow; "
    assert problems({field: old + 1}, SOURCE.model_dump(), operator=name) == [
        message + f"set {H}.model.{field} to {old}"
    ]


@pytest.mark.parametrize(("name", "target", "options"), LAWFUL, ids=str)
def test_moments_are_those_that_the_grown_model_would_have(
    name: OperatorName, target: Sizes, options: dict[str, Any]
) -> None:
    found = case(SOURCE, target, operator=name, **options)
    assert worst_moment(found) <= TOLERANCE
    assert all(mask.any() for mask in reached(found).values())


def test_moments_of_depth_and_width_together() -> None:
    target = COPIED | {"num_hidden_layers": 8}
    found = case(SOURCE, target, operator=["zero_depth", "direct_width"])
    assert difference(found) <= TOLERANCE
    assert worst_moment(found) <= TOLERANCE


def test_a_copied_hybrid_follows_its_source() -> None:
    found = case(SOURCE, INTEGER, operator="mup_copy")
    assert trajectory_difference(found, steps=50) <= 1e-9
    assert trajectory_difference(found, scales={}) > 1e-4


def learned_case() -> Case:
    target = COPIED | {"num_hidden_layers": 8}
    return case(SOURCE, target, operator=["learn_depth", "learn_width"])


def test_learned_growth_starts_exactly() -> None:
    found = learned_case()
    assert found.growth.preserves_function
    assert difference(found) <= TOLERANCE


def test_learned_growth_mixes_layers_of_one_type() -> None:
    """The formula of LiGO, written out for the parameters of channels, and its slices."""
    found = learned_case()
    growth = resolve_operators(found.source, found.target, found.options, "7")
    learned = disturbed(initial(growth, torch.device("cpu"), torch.float64))
    weights, plan = random_weights(found.source), parameter_plan(found.target, tp=2)
    b, a = learned.produces["inner"], learned.consumes["inner"]
    for name, left, right in (
        ("A_log", b, None),
        ("conv1d.weight", b, None),
        ("dt_proj.bias", b, None),
        ("x_proj.weight", None, a),
        ("out_proj.weight", learned.produces["residual"], a),
    ):
        factors = learned.depth[f"mamba.{name}"][6]
        mixed = sum(factors[j] * weights[f"model.layers.{j}.mamba.{name}"] for j in (0, 2))
        expected = mixed if left is None else left @ mixed
        expected = expected if right is None else expected @ right.T
        spec = plan[f"model.layers.6.mamba.{name}"]
        recipe = learned.recipe(spec)
        assert recipe.sources == tuple(f"model.layers.{j}.mamba.{name}" for j in (0, 2))
        parts = [grown_slice(spec, recipe, mixed, 2, rank) for rank in range(2)]
        whole = torch.cat(parts, dim=spec.tp_dim).view_as(expected)
        torch.testing.assert_close(whole, expected)
    assert not learned_map(learned).preserves_function
