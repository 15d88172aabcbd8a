"""The check of function-preserving growths: exact ones pass in every precision, wrong ones do not.

The batch is tiny: one sequence of 16 tokens.
"""

from typing import Any

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.errors import ConfigError
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.growth_event.cost import Feed
from megagrow.train.growth_event.event import end_stage, grow
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import build_stage
from megagrow.train.state_check import (
    change,
    check_preserved,
    fixed_loss,
    fixed_tokens,
    predictions,
)
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, make_run
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

STEPS, LENGTH = 30, 16
SOURCE = MODEL | {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
SOURCE |= {"head_dim": 16, "rms_norm_eps": 1e-5}
TWICE = {"hidden_size": 128, "intermediate_size": 192}
TWICE |= {"num_attention_heads": 8, "num_key_value_heads": 4}
ODD = {"hidden_size": 80, "rms_norm_eps": 1e-5 * 64 / 80}
GROWTHS: dict[str, dict[str, Any]] = {
    "direct_width": TWICE,
    "hypercloning": TWICE,
    "lemon": ODD | {"intermediate_size": 128},
    "isometric": ODD,
    "zero_depth": {"num_hidden_layers": 4},
}


def growing(folder: Any, name: str, precision: str) -> RunConfig:
    common = {"batch": {"global_batch_size": 1, "micro_batch_size": 1}}
    common |= {"parallel": {"zero_stage": 1}, "optimizer": {"lr": 3e-3}}
    grown = {"model": SOURCE | GROWTHS[name], "growth": {"operator": name}, "tokens": LENGTH}
    stages = [{"model": SOURCE, "tokens": STEPS * LENGTH, **common}, grown | common]
    return make_run(folder, stages, precision=precision)


def verdicts(runs: list[RunConfig]) -> list[list[str]]:
    """For each growth the complaints: about the growth itself, then about a defect in it."""
    run, state, stop, out = runs[0], RunState(), StopSignal(), []
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    inputs = open_inputs(run)
    feed, fixed = StepFeed(inputs.train), inputs.stages[0].fixed
    tokens = fixed_tokens(run, fixed)
    while isinstance(event := advance(run, stage, state, feed, stop), StepDone):
        state = event.state
    losses = [fixed_loss(run, stage, 0, fixed)]
    before, ended = predictions(stage, fixed, None), end_stage(stage)
    for run in runs:
        stage, report = grow(run, ended, Feed(feed, state.next_place))
        assert report.preserves_function
        found = []
        for factor in (1.0, 1.5):  # of the output of a layer that the model had before
            stage.engine.storage()["model.layers.0.mlp.down_proj.weight"]["fp32"].mul_(factor)
            stage.engine.ready(0)
            after = fixed_loss(run, stage, 0, fixed)
            difference = change(before, predictions(stage, fixed, None))
            try:
                check_preserved(run, stage, STEPS, [*losses, after], difference, tokens)
                found.append("")
            except ConfigError as error:
                found.append(str(error))
        out.append(found)
        stage.release()
    return out


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_exact_growths_pass_and_wrong_ones_do_not(tmp_path, precision):
    runs = [growing(tmp_path, name, precision) for name in GROWTHS]
    (found,) = run_ranks(1, verdicts, runs)
    for name, (exact, wrong) in zip(GROWTHS, found, strict=True):
        assert exact == "", name
        assert f"by {name} should preserve the function" in wrong
        assert f"the rounding of {precision} explains on 512 tokens" in wrong
