"""Duration of the mask ramp, refused settings, and the start of a masked growth at its source."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.growth.mask_schedule import GROW_STEPS, ramp_problems, ramp_tokens, stage_masks
from megagrow.growth.operators import growth_map
from megagrow.model.decoder import CausalLM
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run
from tools.docs.operators.dense_growth import grown

DEEP = MODEL | {"num_hidden_layers": 4, "head_dim": 8}
WIDE = MODEL | {
    "hidden_size": 44,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 70,
}
BOTH = WIDE | {"num_hidden_layers": 4}


def a_run(
    folder: Path, model: dict[str, Any], *operators: str, tokens: int = 10**9, **options: Any
) -> RunConfig:
    growth = {"operator": list(operators), **options}
    return make_run(folder, [{"tokens": 64}, {"model": model, "tokens": tokens, "growth": growth}])


def test_by_default_a_ramp_is_5000_steps_and_ends_with_the_stage(tmp_path):
    ramp = GROW_STEPS * STEP_TOKENS
    assert ramp_tokens(a_run(tmp_path, DEEP, "random_depth"), 1) == ramp
    assert ramp_tokens(a_run(tmp_path, WIDE, "random_width"), 1) == 3 * ramp, "one after the other"
    one_axis = MODEL | {"intermediate_size": 70}
    assert ramp_tokens(a_run(tmp_path, one_axis, "random_width"), 1) == ramp
    assert ramp_tokens(a_run(tmp_path, BOTH, "random_width", "random_depth"), 1) == 3 * ramp
    assert ramp_tokens(a_run(tmp_path, DEEP, "random_depth", tokens=1000), 1) == 1000
    assert ramp_tokens(a_run(tmp_path, DEEP, "random_depth", ramp_tokens=999), 1) == 999


def test_other_operators_and_the_first_stage_have_no_masks(tmp_path):
    run = a_run(tmp_path, DEEP, "zero_depth")
    assert [ramp_tokens(run, index) for index in (0, 1)] == [0, 0]
    assert [stage_masks(run, index, 0) for index in (0, 1)] == [None, None]
    assert stage_masks(a_run(tmp_path, DEEP, "random_depth"), 0, 0) is None
    live = a_run(tmp_path, DEEP, "random_depth", ramp_tokens=0)
    assert (ramp_tokens(live, 1), stage_masks(live, 1, 0), ramp_problems(live)) == (0, None, [])


def test_masks_are_gone_at_the_end_of_the_ramp(tmp_path):
    run = a_run(tmp_path, BOTH, "random_depth", "random_width", ramp_tokens=300)
    assert stage_masks(run, 1, 150).layers == (1.0, 1.0, 0.5, 0.5)
    assert stage_masks(run, 1, 150).residual[-1] == 0.5
    assert stage_masks(run, 1, 299).layers[-1] == pytest.approx(1, abs=0.004)
    assert stage_masks(run, 1, 300) is None


def test_a_ramp_must_end_within_its_stage(tmp_path):
    def problems(*operators: str, **options: Any) -> list[str]:
        return ramp_problems(a_run(tmp_path, DEEP, *operators, tokens=500, **options))

    assert problems("random_depth", ramp_tokens=500) == []
    assert problems("random_depth") == []
    (longer,) = problems("random_depth", ramp_tokens=501)
    assert "stages.1.growth.ramp_tokens = 501 is more than the 500 tokens of stages.1" in longer


@pytest.mark.parametrize("ramp", [{}, {"ramp_tokens": 500}])
def test_masks_are_gone_at_the_end_of_a_stage_whose_batch_changes(tmp_path, ramp):
    run = a_run(tmp_path, DEEP, "random_depth", tokens=500, **ramp)
    before, after = stage_masks(run, 1, 499), stage_masks(run, 1, 500)
    assert before is not None
    assert after is None, "the last step may end before the 512 tokens of complete steps"


def as_state(model: CausalLM) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), p.detach().view(len(p), -1))
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("model", "operators", "options"),
    [
        (DEEP, ("random_depth",), {}),
        (DEEP, ("random_depth",), {"layer_map": [-1, 0, -1, 1]}),
        (WIDE, ("random_width",), {}),
        (BOTH, ("random_depth", "random_width"), {}),
    ],
    ids=["depth", "depth between", "width", "both"],
)
def test_a_masked_growth_begins_exactly_at_its_source(tmp_path, model, operators, options, tied):
    same = {"tie_word_embeddings": tied, "rms_norm_eps": 1e-2}
    run = a_run(tmp_path, model | same, *operators, **options)
    source = ModelConfig(**MODEL, **same)
    target = run.stages[1].model
    run.stages[0] = run.stages[0].model_copy(update={"model": source})
    small = CausalLM(source).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in small.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    growth = growth_map(source, target, run.stages[1].growth, "seed")
    assert growth.preserves_function
    large, made = CausalLM(target).double(), grown(as_state(small), growth, target)
    for name, parameter in large.named_parameters():
        parameter.data.copy_(made[name]["fp32"].view_as(parameter))
    ids = torch.arange(60).view(3, 20)
    positions = torch.arange(20).expand_as(ids)
    expected = small(ids, positions)
    found = large(ids, positions, None, stage_masks(run, 1, tokens=0))
    assert (found - expected).abs().max() < 1e-10
    assert (large(ids, positions) - expected).abs().max() > 1e-2, "without masks it is another one"
