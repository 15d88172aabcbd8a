"""A Samba run that is killed in its growth event resumes as if nothing had happened."""

import shutil
from pathlib import Path

import pytest

import megagrow.train.growth_event.event as growth_event
from megagrow.config.schema import RunConfig
from tests.helpers.checkpoint.written import differences, shards
from tests.helpers.jobs import records
from tests.helpers.model.samba_reference import samba
from tests.helpers.run.grown_runs import ZERO_2, ZERO_3_TP_2, finish, held_at, start
from tests.helpers.runs import STEP_TOKENS, make_run

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BASE, STEPS = 2, 4
SOURCE = samba(vocab_size=101).model_dump()
DEEP = SOURCE | {"num_hidden_layers": 12}


def run_of(folder: Path, later: dict = ZERO_3_TP_2) -> RunConfig:
    """Return a run that grows from 4 to 12 layers, from ZeRO 2 to another layout."""
    folder.mkdir()
    growth = {"operator": "direct_depth", "optimizer_state": "transport"}
    tokens = BASE * STEP_TOKENS
    stages = [
        {"model": SOURCE, "tokens": tokens, "parallel": ZERO_2},
        {"model": DEEP, "tokens": tokens, "parallel": later, "growth": growth},
    ]
    for stage in stages:
        stage["batch"] = {"global_batch_size": 4, "micro_batch_size": 2}
    return make_run(folder, stages, checkpoint={"interval": 1})


def losses(run: RunConfig) -> list[tuple]:
    return records(run, "train", ("step", "tokens", "lr", "loss", "grad_norm"))


def checkpoint_of(run: RunConfig) -> Path:
    """Return the last checkpoint."""
    return run.output_dir / "checkpoints" / f"step-{STEPS:09d}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = run_of(tmp_path_factory.mktemp("samba") / "whole")
    finish(start(run))
    assert [step for step, *_ in losses(run)] == [1, 2, 3, 4]
    return run


def test_killed_within_the_growth(tmp_path: Path, undisturbed: RunConfig) -> None:
    run, reached = run_of(tmp_path / "killed"), tmp_path / "reached"
    reached.mkdir()
    job = start(run, held_at(growth_event, "exchange", reached))
    job.wait_for(lambda: len(list(reached.iterdir())) == 1)
    job.kill()
    finish(start(run))
    assert records(run, "start", ["step"]) == [(0,), (BASE,)]
    assert losses(run) == losses(undisturbed)
    assert differences(*(shards(checkpoint_of(each)) for each in (run, undisturbed))) == []


def test_another_layout_resumes_after_the_growth(tmp_path: Path, undisturbed: RunConfig) -> None:
    """The last step is trained again, from the checkpoint before it."""
    run = run_of(tmp_path / "moved", {"zero_stage": 1})
    shutil.copytree(undisturbed.output_dir, run.output_dir)
    shutil.rmtree(checkpoint_of(run))
    finish(start(run))
    assert records(run, "start", ["step"])[-1] == (STEPS - 1,)
    for found, right in zip(losses(run), losses(undisturbed), strict=True):
        assert found == pytest.approx(right, rel=1e-5)
