"""Training through pipelines equals training in one process."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import megagrow.train.step
from megagrow.config.schema import RunConfig
from megagrow.parallel.flat_gradients import FlatGradients
from megagrow.parallel.pipeline.tied_head import TiedHead
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage
from megagrow.train.step import mean_loss
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, full_tensors, make_run
from tests.helpers.spawn import run_ranks

PP = "pipeline_model_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
TP, CP = "tensor_model_parallel_size", "context_parallel_size"
A2A = ("cp_comm_type", "a2a")
PACKED = {"sequence_length": 16, "reset_attention_mask": True, "reset_position_ids": True}
STEPS = 20


class Case(NamedTuple):
    """Layout of a run, and what it trains."""

    pp: int = 1
    virtual: int = 1
    zero: int = 0
    tp: int = 1
    cp: int = 1
    micro: int = 1
    tied: bool = False
    batch: int = 8
    precision: str = "fp32"
    optimizer: str = "adamw"
    window: int | None = None
    more: tuple[tuple[str, Any], ...] = ()
    """Further keys of `parallel`."""

    @property
    def alone(self) -> "Case":
        """The same training in one process."""
        return Case(
            tied=self.tied,
            micro=self.micro,
            batch=self.batch,
            precision=self.precision,
            optimizer=self.optimizer,
            window=self.window,
            zero=min(self.zero, 1) if self.precision == "bf16" else 0,
        )

    def run(self, folder: Path) -> RunConfig:
        model = {"num_hidden_layers": 5, "tie_word_embeddings": self.tied}
        stage = {
            "model": MODEL | model | {"sliding_window": self.window},
            "tokens": STEPS * self.batch * PACKED["sequence_length"],
            "batch": {"global_batch_size": self.batch, "micro_batch_size": self.micro},
            "optimizer": {"lr": 3e-3, "type": self.optimizer, "weight_decay_on": "matrices"},
            "parallel": {
                PP: self.pp,
                VPP: self.virtual,
                TP: self.tp,
                CP: self.cp,
                "zero_stage": self.zero,
                **dict(self.more),
            },
        }
        data = {name: [{"path": folder / name}] for name in ("train", "validation")} | PACKED
        return make_run(folder, [stage], data=data, precision=self.precision)


CASES = {
    2: (
        Case(pp=2, tied=True),
        Case(pp=2, virtual=2, zero=1, micro=2),
        Case(pp=2, zero=2, tied=True, batch=1),
        Case(pp=2, zero=1, tied=True, more=(("activation_checkpointing", "full"),)),
        Case(pp=2, zero=1, tied=True, precision="bf16"),
        Case(pp=2, virtual=2, zero=0, precision="bf16"),
        Case(pp=2, virtual=2, zero=1, optimizer="muon", tied=True, batch=5),
    ),
    4: (
        Case(pp=4, zero=1, tied=True, batch=3),
        Case(pp=2, zero=1, tied=True, more=(("account_for_loss_in_pipeline_split", True),)),
        Case(pp=2, virtual=2, zero=2, tied=True, more=(("communication_data_type", "fp32"),)),
        Case(pp=2, tp=2, zero=1, tied=True, more=(("sequence_parallel", True),)),
        Case(pp=2, virtual=2, tp=2, more=(("activation_checkpointing", "selective"),)),
        Case(pp=2, zero=1, optimizer="muon", more=(("offload_optimizer", True),)),
        Case(pp=2, cp=2, zero=1, tied=True, window=5),
        Case(pp=2, virtual=2, cp=2, zero=2, micro=2, more=(A2A,)),
        Case(pp=2, cp=2, zero=1, tied=True, precision="bf16"),
    ),
    8: (
        Case(pp=2, virtual=2, tp=2, zero=2, micro=2),
        Case(pp=2, virtual=2, tp=2, cp=2, zero=1, tied=True, more=(("sequence_parallel", True),)),
        Case(pp=2, cp=4, tied=True, window=5),
        Case(pp=4, cp=2, zero=1, tied=True, batch=3),
    ),
}
"""By the number of ranks."""

Found = tuple[list[float], dict[str, dict[str, torch.Tensor]]]
"""Losses and gradient norms of all steps and a validation loss; the state after them."""


def trained(folder: Path, cases: tuple[Case, ...]) -> list[Found]:
    return [train_case(case.run(folder)) for case in cases]


def train_case(run: RunConfig) -> Found:
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    inputs, stop, state = open_inputs(run), StopSignal(), RunState()
    numbers = []
    with StepFeed(inputs.train) as feed:
        while isinstance(event := advance(run, stage, state, feed, stop), StepDone):
            numbers += [event.measure.loss, event.measure.grad_norm]
            state = event.state
    numbers.append(mean_loss(stage, inputs.stages[0].fixed, 7, None))
    full = full_tensors(stage.layout, stage.engine.storage())
    stage.release()
    return numbers, full if dist.get_rank() == 0 else {}


def difference(ours: Found, expected: Found) -> tuple[float, float]:
    """The largest differences of losses and norms, and of the state."""
    numbers = max(abs(a - b) for a, b in zip(ours[0], expected[0], strict=True))
    states = (
        (ours[1][name][kind] - tensor).abs().max().item()
        for name, kinds in expected[1].items()
        for kind, tensor in kinds.items()
    )
    return numbers, max(states)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    Case().run(path)  # writes the corpora
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[Case, Found]:
    cases = tuple(dict.fromkeys(case.alone for each in CASES.values() for case in each))
    (found,) = run_ranks(1, trained, folder, cases)
    return dict(zip(cases, found, strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("world", CASES)
def test_twenty_steps_equal_one_process(world: int, folder: Path, alone: dict) -> None:
    by_rank = run_ranks(world, trained, folder, CASES[world])
    for index, case in enumerate(CASES[world]):
        for found in by_rank:
            assert found[index][0] == by_rank[0][index][0], "all ranks report the same"
        numbers, state = difference(by_rank[0][index], alone[case.alone])
        limit = 1e-5 if case.precision == "fp32" else 3e-2
        assert numbers <= limit, (case, numbers, state)
        assert state <= (2e-5 if case.precision == "fp32" else 3e-2), (case, numbers, state)


def without_the_gradient_of_the_head(folder: Path, case: Case) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiedHead, "send_gradient", lambda *_: None)
        patch.setattr(FlatGradients, "expect_late", lambda *_: None)
        return train_case(case.run(folder))


@pytest.mark.dist
def test_a_tied_head_without_its_gradient_differs(folder: Path, alone: dict) -> None:
    case = Case(pp=2, zero=1, tied=True)
    found = run_ranks(2, without_the_gradient_of_the_head, folder, case)
    assert difference(found[0], alone[case.alone])[1] > 1e-3


def with_a_spoilt_step(folder: Path, case: Case) -> Found:
    """The loss of one micro-batch of the third step is not finite, where it is computed."""
    output, calls = megagrow.train.step._chunk_output, [0]

    def spoiling(stage: Stage, chunk: int, *arguments: Any) -> torch.Tensor:
        result = output(stage, chunk, *arguments)
        if chunk == stage.engine.split.last_chunk and torch.is_grad_enabled():
            calls[0] += 1
            return result * torch.nan if calls[0] == 2 * case.batch + 3 else result
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megagrow.train.step, "_chunk_output", spoiling)
        return train_case(case.run(folder))


@pytest.mark.dist
@pytest.mark.parametrize("zero", [0, 1])
def test_a_loss_that_is_not_finite_skips_the_step_on_all_ranks(zero: int, folder: Path) -> None:
    case = Case(pp=2, zero=zero, tied=True)
    (expected,) = run_ranks(1, with_a_spoilt_step, folder, case.alone)
    first, last = run_ranks(2, with_a_spoilt_step, folder, case)
    for found in (expected, first, last):
        assert [index for index, x in enumerate(found[0]) if not math.isfinite(x)] == [4, 5]
        found[0][4:6] = []
    assert first[0] == last[0]
    numbers, state = difference(first, expected)
    assert numbers <= 1e-5 and state <= 2e-5, (numbers, state)
