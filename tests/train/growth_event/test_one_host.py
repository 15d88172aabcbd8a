"""Ranks of one host grow, and update their weights, without sending tensors by gloo."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.parallel import materialize
from megagrow.reshard import exchange
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, STEP_TOKENS, grow_live, make_run, parallel_of
from tests.helpers.spawn import run_ranks

WORLD = 4
SCALARS = 128
"""Bytes up to which a collective is about norms, losses, sizes and flags."""
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single",
               "broadcast", "send")  # fmt: skip
CASES = {
    "ZeRO 1 fp32": (parallel_of(1, 1), "fp32"),
    "ZeRO 1 tp 2 bf16": (parallel_of(1, 2), "bf16"),
    "ZeRO 2 bf16": (parallel_of(2, 1), "bf16"),
    "ZeRO 2 tp 2 fp32": (parallel_of(2, 2), "fp32"),
    "ZeRO 2 offload": (parallel_of(2, 1) | {"offload_optimizer": True}, "bf16"),
    "ZeRO 3 fp32": (parallel_of(3, 1), "fp32"),
}


@dataclass
class Found:
    """One rank's view of a growth and of the steps after it."""

    sent: Counter
    """Bytes of tensors given to each collective during the growth."""
    gathered: int
    """Bytes of all-gathers in the steps after it."""
    weights: list[list[torch.Tensor]]
    """Forward weights after the growth and after the steps; none under ZeRO 3."""


def record(patch: pytest.MonkeyPatch, sent: Counter) -> None:
    """Counts the bytes of tensors given to collectives."""

    def counted(name: str, *given: Any, **named: Any) -> Any:
        tensors = []
        for value in (*given, *named.values()):
            tensors += value if isinstance(value, list) else [value]
        size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        sent[name] += size if size > SCALARS else 0
        return originals[name](*given, **named)

    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    for name in COLLECTIVES:
        patch.setattr(dist, name, partial(counted, name))


def forward_weights(stage: Stage) -> list[torch.Tensor]:
    parameters = stage.engine._engine.module.parameters()
    zero3 = stage.engine.zero_stage == 3
    return [] if zero3 else [parameter.detach().clone() for parameter in parameters]


def grow_and_train(run: RunConfig, network: bool) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        if network:
            for module in (materialize, exchange):
                patch.setattr(module, "on_one_host", lambda: False)
        stage = build_stage(run, 0, torch.device("cpu"))
        fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
        stage.engine.ready(0)
        sent, steps = Counter(), Counter()
        with patch.context() as during:
            record(during, sent)
            stage = grow_live(run, stage)[0]
        weights = [forward_weights(stage)]
        state, feed, stop = RunState(stage=1), StepFeed(open_inputs(run).train), StopSignal()
        with patch.context() as during:
            record(during, steps)
            while isinstance(event := advance(run, stage, state, feed, stop), StepDone):
                state = event.state
        weights.append(forward_weights(stage))
        stage.release()
    return Found(sent, steps["all_gather"], weights)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    out = {}
    for name, (parallel, precision) in CASES.items():
        stage = {"tokens": 2 * STEP_TOKENS, "parallel": parallel}
        grown = {
            "model": MODEL | {"num_hidden_layers": 4},
            "growth": {"optimizer_state": "transport"},
        }
        folder: Path = tmp_path_factory.mktemp("run")
        out[name] = make_run(folder, [stage, stage | grown], precision=precision)
    return out


def all_cases(runs: dict[str, RunConfig], network: bool) -> dict[str, Found]:
    return {name: grow_and_train(run, network) for name, run in runs.items()}


@pytest.mark.dist
def test_one_host_sends_nothing_and_computes_what_several_hosts_do(runs) -> None:
    shared = run_ranks(WORLD, all_cases, runs, False)
    sent = run_ranks(WORLD, all_cases, runs, True)
    for name in CASES:
        for one, other in zip(shared, sent, strict=True):
            assert not +one[name].sent, name
            assert one[name].gathered == 0, name
            for mine, theirs in zip(one[name].weights, other[name].weights, strict=True):
                assert all(map(torch.equal, mine, theirs)), name
            if "ZeRO 3" not in name:
                assert other[name].sent["all_gather"] > 0 and other[name].gathered > 0, name
