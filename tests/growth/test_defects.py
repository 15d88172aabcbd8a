"""Thirteen defects of other implementations: ours has none.

Each test states what is right; where it is cheap, it also shows that the defective formula fails.
The 10th and the 12th need an engine: see `test_engine.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from megagrow.config.growth import StatePolicy
from megagrow.config.schema import OptimizerConfig
from megagrow.growth.lifts import Lift, evenly
from megagrow.growth.map import Axis, Gather
from megagrow.growth.operators import resolve_operators
from megagrow.growth.width import Width
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.growth.building import Built
from tests.helpers.growth.cases import Case, case, times, widened
from tests.helpers.growth.computing import difference, random_moments
from tests.helpers.hugging_face import tiny
from tools.docs.operators.dense_growth import grown
from tools.docs.operators.reference_training import (
    Tensors,
    apart,
    fresh_state,
    gradients,
    grown_weights,
    logits,
    random_ids,
    random_weights,
    trained,
    weights_of,
)

TOLERANCE, FAILS = 1e-10, 1e-2

SOURCE = tiny(
    hidden_size=8,
    head_dim=4,
    num_key_value_heads=2,
    intermediate_size=6,
    vocab_size=11,
    rms_norm_eps=0.3,
)
"""Two query heads to each key/value head, a large norm eps."""


def width_of(found: Case) -> Width:
    return resolve_operators(found.source, found.target, found.options, "").width


def test_1_queries_keys_and_values_are_never_one_matrix_that_is_cut_in_thirds() -> None:
    """A fused matrix lies by groups (q q k v, q q k v); cut by widths it is no q, k and v."""
    plan = parameter_plan(SOURCE, tp=1)
    parts = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    assert [plan[name].rows for name in parts] == [16, 8, 8]
    weights = random_weights(SOURCE)
    by_group = [weights[name].unflatten(0, (2, -1)) for name in parts]
    fused = torch.cat(by_group, dim=1).flatten(0, 1)
    cut = dict(zip(parts, fused.split([16, 8, 8]), strict=True))
    assert not any(torch.equal(weights[name], cut[name]) for name in parts)
    found = case(SOURCE, times(SOURCE, 2, 2, 2), operator="direct_width")
    assert difference(found) <= TOLERANCE
    right = grown_weights(found, weights)
    wrong = grown_weights(found, weights | cut)
    assert apart(found, weights, right, random_ids(SOURCE)) <= TOLERANCE
    assert apart(found, weights, wrong, random_ids(SOURCE)) > FAILS


def test_2_every_head_is_copied_whole_and_the_residual_stream_evenly() -> None:
    found = case(SOURCE, widened(SOURCE, 16, 3, 9), operator="bert2bert_fpi")
    lifts = width_of(found).lifts
    assert lifts["residual"].factor == 2
    assert_heads_are_whole(lifts["query"])
    first_third = evenly(16, np.arange(24) % (16 // 3))
    with pytest.raises(AssertionError):
        assert_heads_are_whole(first_third)


def assert_heads_are_whole(lift: Lift) -> None:
    """All rows of a head come from one head, in their order, and each old head is there."""
    heads = lift.index.reshape(-1, SOURCE.head_dim)
    assert (heads % SOURCE.head_dim == np.arange(SOURCE.head_dim)).all()
    assert (np.ptp(heads // SOURCE.head_dim, axis=1) == 0).all()
    assert lift.copies.min() >= 1


def with_gains(found: Case, weights: Tensors, factor: float) -> Tensors:
    """Every gain of a grown model, times a factor."""
    plan = parameter_plan(found.target, tp=1)
    return {n: w * factor if plan[n].is_vector else w for n, w in weights.items()}


def test_3_gains_shrink_by_the_root_of_the_growth() -> None:
    found = case(SOURCE, {"hidden_size": 13}, operator="zero_width")
    before, ids = random_weights(SOURCE), random_ids(SOURCE)
    after = grown_weights(found, before)
    root = (8 / 13) ** 0.5
    assert width_of(found).gain == pytest.approx(root)
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.allclose(after[name][:8], root * before[name])
    assert apart(found, before, after, ids) <= TOLERANCE
    copied, squared = (with_gains(found, after, factor) for factor in (1 / root, root))
    assert apart(found, before, copied, ids) > FAILS
    assert apart(found, before, squared, ids) > FAILS


def test_4_new_neurons_have_a_gradient() -> None:
    found = case(SOURCE, {"intermediate_size": 9}, operator="zero_width")
    after = grown_weights(found, random_weights(SOURCE))
    down = "model.layers.0.mlp.down_proj.weight"
    assert not after[down][:, 6:].any()
    assert gradients(found.target, after, random_ids(SOURCE))[down][:, 6:].all()
    for part in ("gate", "up"):
        after[down.replace("down", part)][6:] = 0
    assert not gradients(found.target, after, random_ids(SOURCE))[down][:, 6:].any()


def first_updates(beta2: float, m: float, v: float, step: int, steps: int = 1) -> list[float]:
    """Updates over lr by Adam of an entry whose gradient is always 1."""
    entry = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([entry], lr=1.0, betas=(0.9, beta2), eps=0.0)
    start = torch.ones(1, dtype=torch.float64)
    moments = {"exp_avg": m * start, "exp_avg_sq": v * start}
    adam.state[entry] = {"step": torch.tensor(float(step)), **moments}
    found = []
    for _ in range(steps):
        before = entry.item()
        entry.grad = start.clone()
        adam.step()
        found.append(before - entry.item())
    return found


def test_5_moments_of_zero_under_a_step_that_goes_on() -> None:
    """See also `test_liveness.py`: by our betas no update exceeds 1.1 times lr."""
    _, ours = OptimizerConfig(lr=1.0).betas
    late = 10**6
    assert max(first_updates(ours, 0, 0, late, steps=50)) <= 1.11
    assert max(first_updates(0.999, 0, 0, late, steps=50)) > 6


@pytest.mark.parametrize("policy", get_args(StatePolicy))
def test_6_the_step_goes_on_where_moments_do(policy: StatePolicy) -> None:
    options = {"operator": "direct_depth", "optimizer_state": policy}
    found = case(SOURCE, {"num_hidden_layers": 4}, **options).growth
    state = grown(random_moments(SOURCE), found, SOURCE.model_copy(update={"num_hidden_layers": 4}))
    kept = any(kinds["exp_avg_sq"].any() for kinds in state.values())
    assert found.keeps_step == kept == (policy != "reset")


def test_6_a_step_that_begins_again_would_scale_the_first_updates() -> None:
    assert first_updates(0.95, 1, 1, 10**6) == pytest.approx([1.0])
    assert first_updates(0.95, 1, 1, 0) == pytest.approx([2.24], abs=0.01)
    assert first_updates(0.999, 1, 1, 0) == pytest.approx([0.32], abs=0.01)


def test_6_copies_of_moments_are_numbers_of_their_own() -> None:
    """That of the engine's tensors none share memory is tested in `test_engine.py`."""
    kept = {"operator": "direct_depth", "optimizer_state": "transport"}
    found = case(SOURCE, {"num_hidden_layers": 4}, **kept)
    state = grown(random_moments(SOURCE), found.growth, found.target)
    one, other = (state[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 2))
    for kind in one:
        assert torch.equal(one[kind], other[kind])
        one[kind].zero_()
        assert other[kind].any()


def test_7_copies_by_four_take_updates_of_the_usual_size() -> None:
    """The gradient falls to a quarter. With m and v of before, v would be too large for long."""
    (scale,) = {
        found.growth.scales[name].eps
        for found in [case(SOURCE, times(SOURCE, 4, 4, 4), operator="direct_width")]
        for name in ["model.layers.0.mlp.up_proj.weight"]
    }
    assert scale == 1 / 4
    late = 10**6
    m, v = 1 / scale, 1 / scale**2  # of before, seen from a gradient of 1
    assert first_updates(0.95, m * scale, v * scale**2, late, 50) == pytest.approx([1.0] * 50)
    assert min(first_updates(0.95, m, v, late, 100)) == pytest.approx(0.53, abs=0.01)
    assert min(first_updates(0.999, m, v, late, 100)) == pytest.approx(0.26, abs=0.01)


def test_8_second_moments_take_the_square_of_the_factor() -> None:
    found = case(SOURCE, times(SOURCE, 2, 2, 2), operator="direct_width").growth
    for name in found.moments:
        (m,), (v,) = found.terms(name, "exp_avg"), found.terms(name, "exp_avg_sq")
        factors = [first_factor(term) for term in (m, v)]
        assert factors[1] == factors[0] ** 2
        assert name == "lm_head.weight" or factors[0] == 1 / 2, "the square is another number"


def first_factor(term: Any) -> float:
    along = [1.0 if axis.scale is None else axis.scale[0] for axis in (term.rows, term.cols)]
    return along[0] * along[1]


def test_9_empty_blocks_have_the_moments_of_their_gradients() -> None:
    found = case(SOURCE, times(SOURCE, 2, 2, 2), operator="staged_width")
    before, ids = random_weights(SOURCE), random_ids(SOURCE)
    old, new = (
        gradients(config, weights, ids)
        for config, weights in (
            (SOURCE, before),
            (found.target, grown_weights(found, before)),
        )
    )
    state = {name: {"exp_avg": g} for name, g in old.items()}
    moved = grown(state, found.growth, found.target, ("exp_avg",))
    name = "model.layers.1.mlp.gate_proj.weight"
    weight, moment = grown_weights(found, before)[name], moved[name]["exp_avg"]
    empty = weight == 0
    assert empty.sum() == weight.numel() // 2
    assert moment[empty].all()
    assert (moment - new[name]).abs().max() <= TOLERANCE


def test_9_and_its_halves_may_be_parted() -> None:
    found = case(SOURCE, times(SOURCE, 2, 2, 2), operator="staged_width", noise=0.5)
    assert difference(found) <= TOLERANCE
    start = fresh_state(grown_weights(found, random_weights(SOURCE)))
    after = weights_of(trained(found.target, start, [random_ids(SOURCE)] * 5))
    up = after["model.layers.0.mlp.up_proj.weight"]
    assert (up[0::2, 0::2] - up[1::2, 1::2]).abs().max() > 1e-4


def test_11_what_produces_copies_is_not_divided() -> None:
    found = case(SOURCE, times(SOURCE, 2, 2, 2), operator="bert2bert_fpi")
    before, ids = random_weights(SOURCE), random_ids(SOURCE)
    for name, terms in found.growth.weights.items():
        assert all(isinstance(t, Gather) and t.rows.scale is None for t in terms), name
    assert apart(found, before, grown_weights(found, before), ids) <= TOLERANCE
    divided = {name: rows_divided(terms[0]) for name, terms in found.growth.weights.items()}
    weights = {name: (term,) for name, term in divided.items()}
    wrong = Built(SOURCE, found.target, replace(found.growth, weights=weights))
    assert apart(wrong, before, grown_weights(wrong, before), ids) > FAILS


def rows_divided(term: Gather) -> Gather:
    """Rows shared out among their copies, as columns are."""
    if term.rows.index is None:
        return term
    return replace(term, rows=Axis(term.rows.index, np.full(len(term.rows.index), 0.5)))


def at(layer: int, layers: int, weights: Tensors, gain: Callable[[int], float]) -> Tensor:
    """Logits of a model whose only speaking layer stands at one place among silent ones; its gains
    are multiplied by a function of that place."""
    config = SOURCE.model_copy(update={"num_hidden_layers": layers})
    placed = {name: w for name, w in weights.items() if ".layers." not in name}
    for place in range(layers):
        for name, w in weights.items():
            if name.startswith("model.layers.0."):
                silent = place != layer and ("o_proj" in name or "down_proj" in name)
                factor = gain(place) if name.endswith("layernorm.weight") else 1.0
                placed[name.replace("0.", f"{place}.", 1)] = w * (0.0 if silent else factor)
    return logits(config, placed, random_ids(config))


def test_13_a_layer_does_not_know_its_number() -> None:
    weights = random_weights(SOURCE)
    alone = at(0, 1, weights, lambda place: 1.0)
    for layer in range(4):
        assert torch.equal(at(layer, 4, weights, lambda place: 1.0), alone)
    scaled = at(3, 4, weights, lambda place: (place + 1) ** -0.5)
    assert (scaled - alone).abs().max() > FAILS, "LayerNorm Scaling: 1 / sqrt(layer + 1)"


def test_13_silent_layers_may_stand_anywhere() -> None:
    for layers in ([0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0]):
        sizes = {"num_hidden_layers": 4}
        for block in ("copy", "random"):
            found = case(
                SOURCE, sizes, operator="zero_depth", layer_map=layers, new_layer_init=block
            )
            assert difference(found) == 0.0
