"""Bad input: every rank leaves with exit code 2, and all of them together say one line."""

import os
import shutil
from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.config.schema import RunConfig
from tests.helpers.checkpoint.damage import flip
from tests.helpers.jobs import records, write_run
from tests.helpers.run.refusals import completed_run, refused, refused_run, tiny_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

pytestmark = pytest.mark.dist

TENSOR = "stages.0.parallel.tensor_model_parallel_size"
NO_RUNS = {
    "unknown key": ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
    "heads": (f"{TENSOR}=4", "stages.0.model.num_key_value_heads = 2 is not divisible by"),
    "world": (
        "stages.0.batch.micro_batch_size=4",
        "stages.0.batch.global_batch_size = 4 is not divisible by micro_batch_size x data "
        "parallel = 4 x 2",
    ),
    "width": (
        "stages.1.model.hidden_size=64",
        "stages.1.model changes hidden_size from 32 to 64, which direct_depth cannot grow; set "
        "stages.1.growth.operator to [direct_depth, direct_width]",
    ),
    "layers": (
        "stages.1.model.num_hidden_layers=5",
        "stages.1.model.num_hidden_layers = 5 is not divisible by "
        "stages.0.model.num_hidden_layers = 2",
    ),
    "kernels": (
        "stages.1.kernels.attention=flash_attn",
        "stages.1.kernels.attention = flash_attn: flash-attn is not installed",
    ),
    "index": (
        "stages.1.growth.layer_map=[0, 1, 2, 1]",
        "stages.1.growth.layer_map contains layer 2, but stages.0.model has layers 0 to 1",
    ),
}
"""An override that no run survives, and what is said of it."""


@pytest.fixture
def path(tmp_path) -> Path:
    """The file of a tiny run that would come to its end."""
    return write_run(tmp_path / "run.yaml", tiny_run(tmp_path))


@pytest.fixture
def growing(tmp_path) -> Path:
    """The file of a run that grows."""
    target = {"model": MODEL | {"num_hidden_layers": 4}, "growth": {}, "tokens": STEP_TOKENS}
    return write_run(tmp_path / "run.yaml", make_run(tmp_path, [{"tokens": STEP_TOKENS}, target]))


@pytest.mark.parametrize("name", NO_RUNS)
def test_a_run_file_that_makes_no_run(growing, name):
    override, said = NO_RUNS[name]
    assert said in refused_run(growing, override)
    assert not (growing.parent / "run").exists()


def test_a_number_of_ranks_that_makes_no_grid(path):
    said = refused_run(path, f"{TENSOR}=2", world=3)
    assert said.startswith(f"world size 3 is not divisible by {TENSOR} = 2; use a multiple of 2")


def test_an_unknown_key_in_the_file(path):
    path.write_text(path.read_text() + "checkpoints: {interval: 3}\n")
    said = refused_run(path)
    assert said == f"{path}: unknown key 'checkpoints'; did you mean 'checkpoint'?"


@pytest.mark.parametrize("place", ["run", "run/deeper"])
def test_an_output_directory_that_cannot_be(tmp_path, path, place):
    (tmp_path / "run").write_text("a file")
    said = refused_run(path, f"output_dir={tmp_path / place}")
    assert str(tmp_path / place) in said


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunConfig:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    tmp = tmp_path_factory.mktemp("finished")
    run = tiny_run(tmp)
    completed_run(write_run(tmp / "run.yaml", run))
    return run


@pytest.fixture
def again(finished, tmp_path) -> tuple[Path, Path]:
    """The run file of a copy of the finished run, and its checkpoints."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    run = finished.model_copy(update={"output_dir": tmp_path / "run"})
    return write_run(tmp_path / "run.yaml", run), tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize(("key", "was"), [("num_hidden_layers", 2), ("intermediate_size", 48)])
def test_checkpoints_of_another_model(again, key, was):
    path, folder = again
    said = refused_run(path, f"stages.0.model.{key}={2 * was}")
    assert said.startswith(f"{folder / checkpoint_name(6)}: does not fit the run: ")
    assert f"stages.0.model.{key}: {was} -> {2 * was}" in said


def test_a_run_made_shorter_than_its_checkpoint_is_refused(again):
    path, folder = again
    written = (folder.parent / "config.yaml").read_bytes()
    said = refused_run(path, f"stages.0.tokens={STEP_TOKENS}", "seed=7")
    assert "seed: 1234 -> 7, stages.0.tokens: 384 -> 64; restore the old value" in said
    assert said.endswith("--allow-change seed --allow-change stages.0.tokens")
    assert (folder.parent / "config.yaml").read_bytes() == written


def break_shard(checkpoint: Path) -> None:
    """Cuts what rank 1 has saved."""
    file = checkpoint / "rank-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(break_shard, "truncated or damaged, "), (flip, "damaged, its checksum is ")],
    ids=["truncated", "flipped bit"],
)
def test_the_newest_checkpoint_is_damaged(again, finished, damage, said):
    path, folder = again
    damage(folder / "step-000000006")
    out = completed_run(path).out
    assert out[0].count("skipped a damaged checkpoint: ") == 1
    assert f"{folder}/step-000000006/rank-00001.safetensors: {said}" in out[0]
    assert f"| resume | step 4 | {folder}/step-000000004" in out[0]
    again = finished.model_copy(update={"output_dir": folder.parent})
    fields = ("step", "loss")
    assert records(again, "train", fields) == records(finished, "train", fields)


def test_all_checkpoints_are_damaged(again):
    path, folder = again
    for checkpoint in folder.iterdir():
        break_shard(checkpoint)
    said = refused_run(path)
    assert f"no valid checkpoint under {folder}: {folder}/step-000000006/rank-00001" in said
    assert len(list(folder.iterdir())) == 3


COMMANDS = {
    "source": (["prepare", "{tmp}/none", "--tokenizer", "train"], "{tmp}/none: no such file"),
    "tokenizer": (["prepare", "{tmp}", "--tokenizer", "{tmp}/no.model"], "{tmp}/no.model: "),
    "run": (["report", "{tmp}/none"], "{tmp}/none: no such file or directory"),
    "run file": (["config", "show", "{tmp}/none.yaml"], "{tmp}/none.yaml: no such file"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands(tmp_path, name):
    words, said = COMMANDS[name]
    (tmp_path / "text.txt").write_text("some text")
    output = ["--output", f"{tmp_path}-output"] if words[0] != "config" else []
    filled = [word.format(tmp=tmp_path) for word in words]
    assert said.format(tmp=tmp_path) in refused(tmp_path / "said", [*filled, *output], world=1)
