"""A run that was killed or stopped, at whatever instant, goes on as if nothing had happened."""

import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import megagrow.checkpoint.retention
import megagrow.run
import megagrow.train.growth_event.event as growth_event
import megagrow.train.loop
from megagrow.checkpoint.discovery import list_checkpoints, step_of
from megagrow.checkpoint.manifest import read_manifest
from megagrow.checkpoint.save import Save
from megagrow.config.schema import RunConfig
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.stage import Stage
from tests.helpers.jobs import Hook, records
from tests.helpers.run.grown_runs import (
    BASE_STEPS,
    CONTEXT,
    DEEP,
    INTERVAL,
    PIPELINE,
    STEPS,
    ZERO_2,
    ZERO_3_TP_2,
    always,
    around_step,
    assert_close,
    assert_same,
    finish,
    grown_run,
    held_at,
    history,
    holds,
    last_checkpoint,
    start,
)
from tests.helpers.runs import STEP_TOKENS

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WIDE = {"hidden_size": 44, "num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 8}
RAMP = {"operator": ["random_depth", "random_width"], "ramp_tokens": 10 * STEP_TOKENS}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = grown_run(tmp_path_factory.mktemp("undisturbed"))
    finish(start(run))
    seen = history(run)
    assert [step for step, *_ in seen["train"]] == list(range(1, STEPS + 1))
    assert [step for step, *_ in seen["growth"]] == [BASE_STEPS]
    return run


def slowed_after(step: int, reached: Path) -> Hook:
    """Says when a step is done; the next one takes long enough for a signal to come meanwhile."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        train_step = megagrow.train.loop.train_step

        def slow(stage: Stage, *arguments: Any) -> Any:
            result = train_step(stage, *arguments)
            steps.append(result)
            if len(steps) == step + 1:
                if rank == 0:
                    reached.touch()
                time.sleep(0.5)
            return result

        steps: list[Any] = []
        patch.setattr(megagrow.train.loop, "train_step", slow)

    return hook


def test_killed_at_ten_random_steps(tmp_path: Path, undisturbed: RunConfig) -> None:
    run, instants = grown_run(tmp_path), random.Random(0)
    for step in sorted(instants.sample(range(1, STEPS - 2), 10)):
        reached = tmp_path / f"step-{step}"
        job = start(run, around_step(step, reached))
        job.wait_for(reached.exists)
        time.sleep(instants.uniform(0, 0.1))
        job.kill()
    finish(start(run))
    assert len(records(run, "start", ["step"])) == 11
    assert_same(run, undisturbed)


def is_whole(path: Path, *_: Any) -> bool:
    return (path / "manifest.json").exists()


WORST = [
    # what is held, where, how many ranks come to it, the step from which the next start goes on
    ("a shard is missing, the training goes on", Save, "write", 2, 0),
    ("all shards there, not yet renamed", Save, "_finish", 1, 0),
    ("renamed, not yet recorded", megagrow.checkpoint.retention, "prune_checkpoints", 1, 3),
    ("an old checkpoint is being removed", shutil, "rmtree", 1, 9),
    ("the last shard before the growth is missing", Save, "write", 2, 9),
    ("the growth begins", megagrow.run, "grow_best", 1, BASE_STEPS),
    ("the target stands, nothing moved", growth_event, "exchange", 1, BASE_STEPS),
    ("grown, not yet recorded", RunLogger, "growth", 2, BASE_STEPS),
    ("a shard is missing after the growth", Save, "write", 2, BASE_STEPS),
]


def test_killed_at_the_worst_instants(tmp_path: Path, undisturbed: RunConfig) -> None:
    run = grown_run(tmp_path)
    for number, (_, place, name, ranks, _) in enumerate(WORST):
        reached = tmp_path / str(number)
        reached.mkdir()
        job = start(run, held_at(place, name, reached, is_whole if name == "rmtree" else always))
        job.wait_for(partial(holds, reached, ranks))
        job.kill()
    finish(start(run))
    begun = [step for (step,) in records(run, "start", ["step"])]
    assert begun == [0, *(step for *_, step in WORST)]
    assert_same(run, undisturbed)
    found = list_checkpoints(run.output_dir / "checkpoints")
    kept = {step_of(path): read_manifest(path).protected for path in found}
    assert kept == {BASE_STEPS: "before growth", 24: None, STEPS: None}


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (7, ZERO_2, ZERO_3_TP_2),
        (7, CONTEXT, PIPELINE),
        (19, PIPELINE, CONTEXT),
        (19, ZERO_2, PIPELINE),
    ],
)
def test_killed_and_resumed_in_another_layout(
    tmp_path: Path,
    undisturbed: RunConfig,
    step: int,
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    reached = tmp_path / "reached"
    job = start(grown_run(tmp_path, before), around_step(step, reached))
    job.wait_for(reached.exists)
    job.kill()
    run = grown_run(tmp_path, after, micro_batch_size=1 if after == PIPELINE else 4)
    finish(start(run))
    ((resumed,),) = records(run, "start", ["step"])[1:]
    assert step - 2 * INTERVAL < resumed <= step + 2, "the newest may not have been whole yet"
    assert_close(run, undisturbed)


def masked_run(folder: Path) -> RunConfig:
    folder.mkdir()
    return grown_run(folder, ZERO_3_TP_2, 4, DEEP | WIDE, RAMP)


def test_killed_while_masks_rise(tmp_path: Path) -> None:
    whole, run = masked_run(tmp_path / "whole"), masked_run(tmp_path / "killed")
    finish(start(whole))
    ((*_, before, after, layers),) = history(whole)["growth"]
    assert layers == [0, 1, -1, -1]
    assert after == pytest.approx(before, rel=1e-6), "masks of 0 keep the function"
    reached = tmp_path / "reached"
    job = start(run, around_step(BASE_STEPS + 7, reached))
    job.wait_for(reached.exists)
    job.kill()
    finish(start(run))
    assert BASE_STEPS < records(run, "start", ["step"])[-1][0] < BASE_STEPS + 10, "within the ramp"
    assert_same(run, whole)


def test_a_finished_run_says_so_and_does_nothing(undisturbed: RunConfig) -> None:
    before = history(undisturbed), last_checkpoint(undisturbed)
    done = finish(start(undisturbed))
    assert f"run test | resume | step {STEPS} | {undisturbed.output_dir}" in done.out[0]
    assert f"run test | done | {STEPS} steps | {STEPS * STEP_TOKENS} tokens | " in done.out[0]
    assert "run test | complete | nothing to train; increase tokens to continue" in done.out[0]
    assert "saved" not in done.out[0]
    assert (history(undisturbed), last_checkpoint(undisturbed)) == before


@pytest.mark.parametrize(
    ("step", "signals"),
    [
        (8, [signal.SIGTERM]),
        (8, [signal.SIGUSR1]),
        (8, [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]),
        (BASE_STEPS, [signal.SIGTERM]),
    ],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C under a launcher", "in the last step before a growth"],
)
def test_stopped_by_a_signal(
    tmp_path: Path, undisturbed: RunConfig, step: int, signals: list[signal.Signals]
) -> None:
    run, reached = grown_run(tmp_path), tmp_path / "reached"
    job = start(run, slowed_after(step - 1, reached))
    job.wait_for(reached.exists)
    for number in signals:
        job.signal(number)
        time.sleep(0.02)
    done = finish(job)
    name = signals[0].name
    assert f"run test | stopped by {name} | {step} steps | " in done.out[0]
    assert records(run, "end", ["step", "stopped"]) == [(step, name)]
    assert records(run, "growth", ["step"]) == []
    assert step_of(list_checkpoints(run.output_dir / "checkpoints")[-1]) == step
    finish(start(run))
    assert records(run, "start", ["step"]) == [(0,), (step,)]
    assert_same(run, undisturbed)
