"""Learned growths as values: where they begin, what they make, and the map that they end in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig
from megagrow.growth.ligo import LigoParameters, forming_flops, grown_slice, learned_map
from megagrow.growth.map import Dense, Gather
from megagrow.growth.map_checks import check_map
from megagrow.growth.operators import growth_map
from megagrow.growth.validation import growth_problems, learning_problems
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.growth.ligo import (
    GROWTHS,
    by_formula,
    disturbed,
    learned_of,
    outputs,
    source_of,
    state_of,
)
from tests.helpers.hugging_face import tokens
from tests.helpers.runs import MODEL, make_run
from tools.docs.operators.dense_growth import State, grown

NAMES = pytest.mark.parametrize("name", GROWTHS)
TIES = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def weights(state: State, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: kinds["fp32"].to(dtype) for name, kinds in state.items()}


def logits(config: ModelConfig, values: dict[str, Tensor], ids: Tensor) -> Tensor:
    """In the type of the values, norms included."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    with torch.no_grad():
        return outputs(config, values, (ids, positions, None))


OPTIONS = ({}, {"copy_order": "tiled"}, {"copy_split": "uneven"})


@NAMES
@TIES
@pytest.mark.parametrize("options", OPTIONS, ids=["even", "tiled", "uneven"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_it_begins_where_the_source_is(name, tied, dtype, bound, options):
    learned = learned_of(name, tied, dtype, **options)
    growing = learned.growth
    state = state_of(growing.source)
    values = {n: {k: t.to(dtype) for k, t in kinds.items()} for n, kinds in state.items()}
    made = grown(values, learned_map(learned), growing.target)
    ids, _ = tokens(growing.source, batch=2, length=11)
    before = logits(growing.source, weights(values, dtype), ids)
    after = logits(growing.target, weights(made, dtype), ids)
    assert (after - before).abs().max() < bound * before.abs().max()
    # Were the start no special point, this would be no test.
    moved = grown(values, learned_map(disturbed(learned)), growing.target)
    assert (logits(growing.target, weights(moved, dtype), ids) - before).abs().max() > 1e-2


@NAMES
@TIES
def test_the_map_is_the_formula(name, tied):
    learned = disturbed(learned_of(name, tied, torch.float64))
    source, target = learned.growth.source, learned.growth.target
    state = state_of(source)
    double = {n: {k: t.double() for k, t in kinds.items()} for n, kinds in state.items()}
    growth = learned_map(learned)
    check_map(growth, parameter_plan(source, tp=1), parameter_plan(target, tp=1))
    assert not growth.preserves_function and not growth.scales and growth.kinds == ("fp32",)
    made = grown(double, growth, target)
    for parameter, expected in by_formula(learned, weights(double)).items():
        torch.testing.assert_close(made[parameter]["fp32"], expected.detach())


@NAMES
@TIES
@pytest.mark.parametrize("tp", [1, 2])
def test_slices_are_those_of_the_formula(name, tied, tp):
    learned = disturbed(learned_of(name, tied, torch.float64))
    plan = parameter_plan(learned.growth.target, tp)
    values = weights(state_of(learned.growth.source))
    expected = by_formula(learned, values)
    for parameter, spec in plan.items():
        recipe = learned.recipe(spec)
        mixed = sum(a * values[n] for a, n in zip(recipe.alphas, recipe.sources, strict=True))
        slices = [grown_slice(spec, recipe, mixed, tp, rank).detach() for rank in range(tp)]
        shape = spec.slice_shape(tp)
        assert all(s.shape == (shape[:1] if spec.is_vector else shape) for s in slices)
        whole = slices[0] if spec.tp_dim is None else torch.cat(slices, spec.tp_dim)
        assert (whole[spec.rows :] == 0).all(), "padding"
        torch.testing.assert_close(
            whole[: spec.rows].view(spec.rows, -1), expected[parameter].detach()
        )


def test_only_what_grows_is_learned():
    depth, width, both = (learned_of(name, tied=False) for name in ("depth", "width", "both"))
    assert not (depth.produces or depth.consumes or width.depth)
    assert both.depth.keys() == depth.depth.keys() and len(both.depth) == 9
    for learned in (width, both):
        assert learned.produces.keys() == {"residual", "query", "key", "value", "ffn"}
        assert learned.consumes.keys() == {"residual", "mixed", "ffn"}
    assert both.produces["query"].shape == (12, 8), "by heads"
    assert both.produces["value"].shape == (6, 4)
    assert both.consumes["residual"].shape == (96, 32)
    assert both.consumes["residual"] is not both.produces["residual"]
    assert {tuple(matrix.shape) for matrix in both.depth.values()} == {(5, 2)}


def test_new_layers_begin_silent():
    learned = learned_of("depth", tied=False)
    copies = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    silent = torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 1], [0, 0]])
    for tensor, matrix in learned.depth.items():
        expected = (
            silent if tensor in ("self_attn.o_proj.weight", "mlp.down_proj.weight") else copies
        )
        assert torch.equal(matrix, expected), tensor


def test_what_is_not_mixed_is_copied():
    growth = learned_map(disturbed(learned_of("depth", tied=False)))
    assert growth.weights["model.norm.weight"] == (Gather("model.norm.weight"),)
    (term,) = growth.weights["model.layers.4.mlp.up_proj.weight"]
    assert isinstance(term, Dense) and term.left is None and term.right is None
    assert growth.provenance == (0, 0, 0, 1, 1)


def test_maps_of_all_layers_share_their_matrices():
    growth = learned_map(learned_of("both", tied=False))
    first, last = (growth.weights[f"model.layers.{n}.mlp.up_proj.weight"][0] for n in (0, 4))
    assert first.left is last.left and first.right is last.right


@TIES
@pytest.mark.parametrize(
    ("name", "plain"), [("width", ["direct_width"]), ("both", ["direct_width", "zero_depth"])]
)
def test_at_the_start_moments_move_as_by_the_plain_operators(name, tied, plain):
    learned = learned_of(name, tied, optimizer_state="transport")
    source, target = learned.growth.source, learned.growth.target
    state = state_of(source)
    found = grown(state, learned_map(learned), target)
    options = GrowthConfig(operator=plain, optimizer_state="transport")
    expected = grown(state, growth_map(source, target, options), target)
    for parameter, kinds in expected.items():
        for kind, tensor in kinds.items():
            torch.testing.assert_close(found[parameter][kind], tensor, msg=parameter)


def test_transported_gradients_are_those_that_give_the_sources_back():
    growth = learned_map(disturbed(learned_of("both", tied=False, optimizer_state="transport")))
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        (weight,) = growth.weights[f"model.layers.0.{name}.weight"]
        (moment,) = growth.moments[f"model.layers.0.{name}.weight"]
        assert moment.sources == (f"model.layers.0.{name}.weight",)
        for one, other in ((weight.left, moment.left), (weight.right, moment.right)):
            identity = torch.from_numpy(one).T @ torch.from_numpy(other)
            torch.testing.assert_close(identity, torch.eye(len(identity)).double())
    assert growth.moments["model.layers.1.mlp.down_proj.weight"] == (), "a new layer"


def test_flops_of_making_weights():
    def flops(learned: LigoParameters, name: str) -> int:
        return forming_flops(learned, [parameter_plan(learned.growth.target, tp=1)[name]])

    both, depth = learned_of("both", tied=False), learned_of("depth", tied=False)
    # 2 layers are mixed; then B, which mixes 8 heads, and A.
    made = 2 * 2 * 32 * 32 + 2 * 48 * 8 * 32 + 2 * 96 * 32 * 48
    assert flops(both, "model.layers.3.self_attn.q_proj.weight") == made
    assert flops(depth, "model.layers.3.self_attn.q_proj.weight") == 2 * 2 * 32 * 32
    assert flops(both, "model.norm.weight") == 2 * 96 * 32
    assert flops(depth, "lm_head.weight") == 0


@pytest.mark.parametrize(
    ("options", "sizes", "said"),
    [
        ({"operator": "learn_depth"}, {}, "operator: learn_depth needs a target with more layers"),
        ({"operator": "learn_width"}, {}, "operator: learn_width needs a wider target"),
        ({"mixing_noise": 0.2}, None, "mixing_noise is not supported by learned operators"),
        (
            {"optimizer_state": "estimate_second_moment"},
            None,
            "optimizer_state = estimate_second_moment: learned operators mix",
        ),
        (
            {"exact_continuation": True},
            None,
            "exact_continuation is not supported by learned operators",
        ),
        ({"learn": {"lr": 1e-6}}, None, "learn.min_lr = 7e-06 is above lr = 1e-06"),
        ({"learn": {"steps": 20}}, None, "learn.warmup_steps = 50 is above steps = 20"),
    ],
)
def test_what_can_not_be_learned(options: dict[str, Any], sizes: dict | None, said: str):
    source = source_of(tied=False)
    operators, usual = GROWTHS["both"]
    chosen = GrowthConfig(**{"operator": operators} | options)
    target = source.model_copy(update=usual if sizes is None else sizes)
    (problem,) = learning_problems(source, target, chosen, "stages.1.growth")
    assert problem.startswith(f"stages.1.growth.{said}")


def test_nothing_is_said_of_what_is_right():
    source, (operators, sizes) = source_of(tied=False), GROWTHS["both"]
    target = source.model_copy(update=sizes)
    for options in ({}, {"operator": "direct_width", "paper_exact": True}):
        chosen = GrowthConfig(**{"operator": operators} | options)
        assert not list(learning_problems(source, target, chosen, "stages.1.growth"))


def test_a_run_is_told_before_it_starts(tmp_path):
    growth = {"operator": "learn_depth", "learn": {"steps": 20}}
    deep = MODEL | {"num_hidden_layers": 3}
    run = make_run(tmp_path, [{"tokens": 64}, {"model": deep, "tokens": 64, "growth": growth}])
    problem = "stages.1.growth.learn.warmup_steps = 50 is above steps = 20; use at most steps"
    assert growth_problems(run) == [problem]
