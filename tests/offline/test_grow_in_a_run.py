"""A run goes on from a checkpoint that was grown file to file, as if it had grown in the job."""

import shutil
from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.schema import RunConfig
from tests.helpers.checkpoint.written import differences, shards
from tests.helpers.jobs import records, train, write_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run
from tests.helpers.train.file_growths import grow

pytestmark = pytest.mark.dist

WORLD, STEPS = 2, 3


def run_of(folder: Path, name: str) -> RunConfig:
    """Three steps of two layers under ZeRO 2, then three of four layers under ZeRO 3 and TP 2."""
    spread = {"zero_stage": 3, "tensor_model_parallel_size": 2}
    stages = [
        {"tokens": STEPS * STEP_TOKENS, "parallel": {"zero_stage": 2}},
        {
            "tokens": STEPS * STEP_TOKENS,
            "model": MODEL | {"num_hidden_layers": 4},
            "growth": {"operator": "direct_depth"},
            "parallel": spread,
        },
    ]
    return make_run(folder, stages, output_dir=folder / name)


def losses(run: RunConfig) -> list[tuple]:
    return records(run, "train", ("step", "tokens", "stage", "loss", "lr"))


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> tuple[Path, RunConfig]:
    folder = tmp_path_factory.mktemp("runs")
    run = run_of(folder, "live")
    assert train(write_run(folder / "live.yaml", run), WORLD).finish().codes == [0] * WORLD
    return folder, run


def test_training_goes_on_from_files_as_from_the_job(live):
    folder, run = live
    name = checkpoint_name(STEPS)
    other = run_of(folder, "files")
    path = write_run(folder / "files.yaml", other)
    grow(
        source=run.output_dir / "checkpoints" / name,
        out=other.output_dir / "checkpoints" / name,
        to=str(path),
        dp=1,
    )
    manifest = read_manifest(other.output_dir / "checkpoints" / name)
    before = read_manifest(run.output_dir / "checkpoints" / name)
    assert manifest.run["counters"] == before.run["counters"]
    assert manifest.environment["config"] == before.environment["config"]
    assert (manifest.layout["zero_stage"], manifest.layout["tp"]) == (3, 2)
    assert train(path, WORLD).finish().codes == [0] * WORLD
    found, wanted = losses(other), losses(run)[STEPS:]
    assert [record[:3] for record in found] == [record[:3] for record in wanted]
    assert len(found) == STEPS
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours[3] == pytest.approx(theirs[3], rel=1e-5)
        assert ours[4] == theirs[4]
    # The same numbers at the start, the same ranks: the same bits at the end.
    ends = [r.output_dir / "checkpoints" / checkpoint_name(2 * STEPS) for r in (run, other)]
    assert differences(*map(shards, ends)) == []


def test_a_model_of_a_run_directory_grows_by_its_own_seed(live, tmp_path):
    folder, run = live
    shutil.copytree(run.output_dir, tmp_path / "ended")
    shutil.rmtree(tmp_path / "ended" / "checkpoints" / checkpoint_name(2 * STEPS))
    said = grow(
        source=tmp_path / "ended",
        out=tmp_path / "out",
        to=str(folder / "live.yaml"),
        overrides=("growth.mixing_noise=0.1",),
    )
    assert f"step {STEPS}" in said
    told = read_manifest(tmp_path / "out").environment["growth"]
    assert told["stream"] == f"{run.seed}/stage-1"
    assert told["options"]["mixing_noise"] == 0.1
