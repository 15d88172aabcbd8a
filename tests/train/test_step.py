"""A stage that never has all logits in memory trains and is measured as one that has them."""

from pathlib import Path

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.reshard.fill import fill_initial
from megagrow.train.inputs import open_inputs
from megagrow.train.loop import StepDone, advance
from megagrow.train.signals import StopSignal
from megagrow.train.stage import build_stage
from megagrow.train.state import RunState
from megagrow.train.step import mean_loss
from tests.runs import STEP_TOKENS, make_run, parallel_of
from tests.spawn import run_ranks

STEPS = 2
KERNELS = (
    {"loss": "torch"},
    {"loss": "torch", "linear_cross_entropy": True},
    {"loss": "triton", "linear_cross_entropy": True},
)


def run_by(folder: Path, kernels: dict) -> RunConfig:
    """ZeRO-3 and TP 2: head and embedding are gathered for their modules only, and sliced."""
    stage = {"tokens": STEPS * STEP_TOKENS, "parallel": parallel_of(3, 2), "kernels": kernels}
    return make_run(folder, [stage])


def train_by(run: RunConfig) -> list[float]:
    """Of each step the loss and the gradient norm, and a measured loss before it."""
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    inputs, stop, out = open_inputs(run), StopSignal(), []
    state = RunState()
    for _ in range(STEPS):
        out.append(mean_loss(stage, inputs.fixed, 3, None))
        event = advance(run, stage, state, inputs.train, stop)
        assert isinstance(event, StepDone)
        out += [event.measure.loss, event.measure.grad_norm]
        state = event.state
    stage.release()
    return out


def train_all(runs: list[RunConfig]) -> list[list[float]]:
    return [train_by(run) for run in runs]


@pytest.mark.dist
def test_linear_cross_entropy_changes_no_number(tmp_path):
    runs = [run_by(tmp_path, kernels) for kernels in KERNELS]
    for plain, *others in run_ranks(4, train_all, runs):
        for found in others:
            assert found == pytest.approx(plain, rel=1e-5)
            assert found != plain, "the same bits: was anything else computed?"
