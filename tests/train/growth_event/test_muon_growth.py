"""Growth and change of the optimizer with Muon in a live run: every bit of the plain result."""

from dataclasses import dataclass

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.reshard.fill import fill_initial
from megagrow.train.growth_event.run_growths import stage_growth
from megagrow.train.stage import Stage, build_stage
from tests.helpers.runs import (
    MODEL,
    STEP_TOKENS,
    full_tensors,
    grow_live,
    make_run,
    parallel_of,
    train_to_end,
)
from tests.helpers.spawn import run_ranks
from tools.docs.operators.dense_growth import State, grown

pytestmark = pytest.mark.dist

WORLD = 4
DEEPER = MODEL | {"num_hidden_layers": 4}
WIDER = DEEPER | {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
ADAMW = {"lr": 1e-2, "weight_decay_on": "matrices"}
MUON = ADAMW | {"type": "muon", "decoupled_lr": 1e-3}
STAGES = [
    {"model": MODEL, "optimizer": ADAMW, "parallel": parallel_of(1, 1)},
    {"model": MODEL, "optimizer": MUON, "parallel": parallel_of(3, 2)},
    {
        "model": DEEPER,
        "optimizer": MUON,
        "parallel": parallel_of(2, 2, sequence_parallel=True),
        "growth": {"operator": "direct_depth", "optimizer_state": "transport"},
    },
    {
        "model": WIDER,
        "optimizer": MUON,
        "parallel": parallel_of(0, 1),
        "growth": {
            "operator": "direct_width",
            "optimizer_state": "estimate_second_moment",
            "second_moment_batches": 1,
        },
    },
    {
        "model": WIDER,
        "optimizer": ADAMW,
        "parallel": parallel_of(3, 1),
    },
]
MATRIX, VECTOR = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@dataclass(frozen=True)
class Transition:
    """State of a stage before and after it became the next one, and Adam's step."""

    before: State
    expected: State
    after: State
    step: int


def snapshot(stage: Stage) -> State:
    full = full_tensors(stage.layout, stage.engine.storage())
    return {name: {kind: t.clone() for kind, t in kinds.items()} for name, kinds in full.items()}


def train(run: RunConfig) -> list[Transition]:
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    state, found = train_to_end(run, stage), []
    for index in range(1, len(STAGES)):
        before, growth = snapshot(stage), stage_growth(run, index)
        stage, report = grow_live(run, stage)
        read = {
            name: kinds | {"momentum_buffer": kinds.get("momentum_buffer", kinds.get("exp_avg"))}
            for name, kinds in before.items()
        }
        rule = stage.layout.matrices
        expected = grown(read, growth, run.stages[index].model, matrices=rule)
        found.append(Transition(before, expected, snapshot(stage), stage.engine.adam_step))
        state = train_to_end(run, stage, state.after_growth(report.layers))
    return found


@pytest.fixture(scope="module")
def transitions(tmp_path_factory) -> list[list[Transition]]:
    stages = [stage | {"tokens": 3 * STEP_TOKENS} for stage in STAGES]
    return run_ranks(WORLD, train, make_run(tmp_path_factory.mktemp("muon"), stages))


def test_momentum_is_the_first_moment_and_then_grows_as_the_weights(transitions) -> None:
    for rank in transitions:
        for transition, step in zip(rank[:2], (3, 6), strict=True):
            assert transition.step == step
            for name, kinds in transition.expected.items():
                assert transition.after[name].keys() == kinds.keys()
                for kind, values in kinds.items():
                    assert torch.equal(transition.after[name][kind], values), (name, kind)
                    assert values.any() or kind == "fp32"
        assert set(rank[0].after[MATRIX]) == {"fp32", "momentum_buffer"}
        assert torch.equal(rank[0].after[MATRIX]["momentum_buffer"],
                           rank[0].before[MATRIX]["exp_avg"])  # fmt: skip


def test_estimated_moments_leave_momentum_as_asymmetric_does(transitions) -> None:
    for rank in transitions:
        transition = rank[2]
        values = transition.after[MATRIX]["momentum_buffer"]
        assert torch.equal(values, transition.expected[MATRIX]["momentum_buffer"])
        assert not values.all() and values.any()
        assert transition.after[VECTOR]["exp_avg_sq"].all()


def test_adamw_starts_again_after_muon(transitions) -> None:
    for rank in transitions:
        transition = rank[3]
        assert transition.step == 0
        for name, kinds in transition.after.items():
            assert torch.equal(kinds["fp32"], transition.before[name]["fp32"])
            assert not kinds["exp_avg"].any() and not kinds["exp_avg_sq"].any()
