"""A pipelined run that was killed or stopped goes on as if nothing had happened."""

import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import megagrow.train.growth_event.event as growth_event
import megagrow.train.loop
from megagrow.config.schema import RunConfig
from megagrow.train.stage import Stage
from tests.helpers.jobs import Hook, records
from tests.helpers.run.grown_runs import (
    BASE_STEPS,
    PIPELINE,
    around_step,
    assert_same,
    finish,
    grown_run,
    held_at,
    holds,
    start,
)

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def within_schedule(step: int, reached: Path) -> Hook:
    """Says when a step is in its third forward pass, which takes long enough for a signal."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        train_step = megagrow.train.loop.train_step

        def stepping(stage: Stage, *arguments: Any) -> Any:
            steps.append(None)
            forward, passes = stage.engine.forward, []

            def passing(*inputs: Any) -> Any:
                passes.append(None)
                if len(passes) == 3 and rank == 0:
                    reached.touch()
                    time.sleep(0.5)
                return forward(*inputs)

            if len(steps) == step:
                patch.setattr(stage.engine, "forward", passing)
            result = train_step(stage, *arguments)
            patch.setattr(stage.engine, "forward", forward)
            return result

        steps: list[None] = []
        patch.setattr(megagrow.train.loop, "train_step", stepping)

    return hook


def pipeline_run(folder: Path) -> RunConfig:
    """Two pipeline ranks, with two chunks each after the growth."""
    folder.mkdir()
    interleaved = PIPELINE | {"virtual_pipeline_model_parallel_size": 2}
    return grown_run(folder, PIPELINE, grown_parallel=interleaved)


def test_a_pipeline_is_killed_and_stopped(tmp_path: Path) -> None:
    whole, run = pipeline_run(tmp_path / "whole"), pipeline_run(tmp_path / "killed")
    finish(start(whole))
    moved = ("bytes_between_ranks", "bytes_between_pipeline_ranks")
    assert records(whole, "growth", moved) == [(0, 0)]
    stepped, growing, passing = (tmp_path / name for name in ("stepped", "growing", "passing"))
    growing.mkdir()
    job = start(run, around_step(7, stepped))
    job.wait_for(stepped.exists)
    job.kill()
    job = start(run, held_at(growth_event, "exchange", growing))
    job.wait_for(partial(holds, growing, 1))
    job.kill()
    job = start(run, within_schedule(2, passing))
    job.wait_for(passing.exists)
    job.signal(signal.SIGTERM)
    stopped = BASE_STEPS + 2
    assert f"run test | stopped by SIGTERM | {stopped} steps | " in finish(job).out[0]
    finish(start(run))
    assert records(run, "start", ["step"])[-1] == (stopped,)
    assert_same(run, whole)
