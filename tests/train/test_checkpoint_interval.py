"""Checkpoints by the clock: rank 0 decides, and all ranks save after the same step."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.common.log_setup import configure_logging
from megagrow.config.schema import RunConfig
from megagrow.train.checkpointer import Checkpointer
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, StepHooks, advance
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.stage import build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.runs import STEP_TOKENS, make_run
from tests.helpers.spawn import run_ranks

STEPS = 5


def checkpointer(run: RunConfig, rank: int) -> Checkpointer:
    device = torch.device("cpu")
    logger = RunLogger(run, rank, 2, {}, configure_logging("WARNING", rank, 2), device)
    return Checkpointer(run, rank, device, {}, logger)


def steps_with_a_save(run: RunConfig) -> list[int]:
    """Train with clocks that differ: rank 0's is one hour per step, rank 1's does not advance."""
    rank, clock = dist.get_rank(), [0.0]
    stage, state, saves = build_stage(run, 0, torch.device("cpu")), RunState(), []
    stage.engine.ready(0)
    with pytest.MonkeyPatch.context() as patch, StepFeed(open_inputs(run).train) as feed:
        patch.setattr("megagrow.train.checkpointer.time.monotonic", lambda: clock[0])
        hooks = StepHooks(background=checkpointer(run, rank))
        for _ in range(STEPS):
            clock[0] += 3600 if rank == 0 else 0
            event = advance(run, stage, state, feed, StopSignal(), hooks)
            assert isinstance(event, StepDone)
            state = event.state
            if event.save:
                saves.append(state.counters.step)
                hooks.background.rewound_to(None)  # starts the interval again, as a save does
    stage.release()
    return saves


@pytest.mark.dist
def test_all_ranks_save_after_the_same_step(tmp_path: Path) -> None:
    options = {"checkpoint": {"interval": "2h"}}
    run = make_run(tmp_path, [{"tokens": STEPS * STEP_TOKENS}], **options)
    assert run_ranks(2, steps_with_a_save, run) == [[2, 4, 5], [2, 4, 5]]


def test_only_the_clock_of_rank_0_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}], checkpoint={"interval": "30min"})
    now = 100.0
    monkeypatch.setattr("megagrow.train.checkpointer.time.monotonic", lambda: now)
    ranks = [checkpointer(run, rank) for rank in range(2)]
    assert [rank.due() for rank in ranks] == [False, False]
    now += 1799
    assert [rank.due() for rank in ranks] == [False, False]
    now += 1
    assert [rank.due() for rank in ranks] == [True, False]
    ranks[0].rewound_to(None)
    assert not ranks[0].due()
    steps = make_run(tmp_path, [{"tokens": STEP_TOKENS}], checkpoint={"interval": 1})
    assert not checkpointer(steps, 0).due()
