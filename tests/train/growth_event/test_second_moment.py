"""The measured second moment is Adam's own mean of g^2; nothing else changes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megagrow.config.schema import RunConfig
from megagrow.data.batches import Batch, sequences_of
from megagrow.data.stage_streams import StreamPlace
from megagrow.model.decoder import CausalLM
from megagrow.train.data_setup import Inputs, open_inputs
from megagrow.train.growth_event.event import measure_second_moment
from megagrow.train.stage import Stage
from tests.helpers.runs import STEP_TOKENS, full_tensors, make_run
from tests.helpers.spawn import run_ranks
from tests.helpers.train.starting import start

STEPS, ADAM_STEP, BETA2, LIMIT = 3, 7, 0.9, 0.5
SEQUENCES = 4
"""Second moment of a step, in micro batches of one."""

LAYOUTS = [
    {"zero_stage": zero, "tensor_model_parallel_size": tp} for zero in range(4) for tp in (1, 2)
]
LAYOUTS += [
    {"zero_stage": 2, "offload_optimizer": True},
    {"zero_stage": 3, "offload_optimizer": True, "tensor_model_parallel_size": 2},
    {"zero_stage": 1, "pipeline_model_parallel_size": 2},
]
State = dict[str, dict[str, Tensor]]


@dataclass
class Measured:
    """The state before and after, and Adam's step after."""

    before: State
    after: State
    adam_step: int


def run_of(folder: Path, parallel: dict, precision: str = "fp32") -> RunConfig:
    optimizer = {"lr": 1e-2, "betas": (0.9, BETA2), "weight_decay": 0.5}
    optimizer["gradient_clipping"] = LIMIT
    stage = {"tokens": 20 * STEP_TOKENS, "optimizer": optimizer, "parallel": parallel}
    return make_run(folder, [stage], precision=precision)


def batches_of(stage: Stage, inputs: Inputs, step: int) -> list[Batch]:
    """This rank's micro batches of a step of the run."""
    mine = sequences_of(SEQUENCES, 1, stage.topology.dp_rank, stage.topology.dp)
    return [inputs.train.read(StreamPlace(step * STEP_TOKENS), indices) for indices in mine]


def state_of(stage: Stage) -> State:
    full = full_tensors(stage.layout, stage.engine.storage())
    return {name: {kind: v.clone() for kind, v in kinds.items()} for name, kinds in full.items()}


def measure(run: RunConfig) -> Measured:
    stage, inputs = start(run), open_inputs(run)
    stage.engine.ready(ADAM_STEP)
    before = state_of(stage)
    measure_second_moment(stage, [batches_of(stage, inputs, step) for step in range(STEPS)], None)
    found = Measured(before, state_of(stage), stage.engine.adam_step)
    stage.release()
    return found


def measure_all(folder: Path) -> tuple[list[Measured], list[Measured]]:
    fp32 = [measure(run_of(folder, parallel)) for parallel in LAYOUTS]
    bf16 = [measure(run_of(folder, {"zero_stage": zero}, "bf16")) for zero in range(4)]
    return fp32, bf16


def by_autograd(folder: Path, weights: State) -> tuple[dict[str, Tensor], list[float]]:
    """(1 - b) sum b^(n-k) g_k^2 / (1 - b^n) of the clipped gradients, and their norms before."""
    model = CausalLM(run_of(folder, {}).stages[0].model).double()
    named, inputs = dict(model.named_parameters()), open_inputs(run_of(folder, {}))
    for name, parameter in named.items():
        parameter.data.copy_(weights[name]["fp32"].view(parameter.shape))
    v, norms = {name: torch.zeros(1) for name in named}, []
    for step in range(STEPS):
        batch = inputs.train.read(StreamPlace(step * STEP_TOKENS), list(range(SEQUENCES)))
        model.zero_grad()
        logits = model(batch.input_ids, batch.position_ids)
        cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), LIMIT)))
        for name, parameter in named.items():
            v[name] = (
                BETA2 * v[name] + (1 - BETA2) * parameter.grad.reshape(len(parameter), -1) ** 2
            )
    return {name: tensor / (1 - BETA2**STEPS) for name, tensor in v.items()}, norms


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    make_run(folder, [{"tokens": 64}])  # the corpus, written once
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[tuple[list[Measured], list[Measured]]]:
    return run_ranks(2, measure_all, folder)


@pytest.mark.dist
def test_it_is_the_mean_that_autograd_gives(folder, found):
    expected, norms = by_autograd(folder, found[0][0][0].before)
    assert min(norms) > LIMIT, "nothing was clipped: the test would prove less"
    for fp32, _ in found:
        for parallel, measured in zip(LAYOUTS, fp32, strict=True):
            for name, v in expected.items():
                here = measured.after[name]["exp_avg_sq"]
                assert (here - v).abs().max() < 1e-5 * v.max(), (parallel, name)


@pytest.mark.dist
def test_nothing_else_changes(found):
    for rank in found:
        for measured in [*rank[0], *rank[1]]:
            assert measured.adam_step == ADAM_STEP
            for name, kinds in measured.after.items():
                assert torch.equal(kinds["fp32"], measured.before[name]["fp32"])
                assert not kinds["exp_avg"].any()
                assert kinds["exp_avg_sq"].any() and not measured.before[name]["exp_avg_sq"].any()
