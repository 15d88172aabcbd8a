"""The target of a rewind, among damaged checkpoints."""

from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import MANIFEST_FILE
from megagrow.config.schema import RunConfig
from megagrow.errors import CheckpointError
from megagrow.train.resume import rewind_target
from megagrow.train.train_state import RunState
from tests.helpers.runs import make_run
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

STAGES = [{"tokens": 640}]


def rewind(run: RunConfig, directory: Path) -> str:
    try:
        found, state = rewind_target(run, directory, RunState(), "a test")
    except CheckpointError as error:
        return str(error)
    return f"{found} {state.counters.step}"


def test_a_rewind_without_checkpoints_restarts_from_the_initial_state(tmp_path):
    run = make_run(tmp_path, STAGES)
    assert run_ranks(2, rewind, run, tmp_path / "none") == ["None 0"] * 2


def test_a_rewind_over_damaged_checkpoints_fails_on_all_ranks_and_keeps_them(tmp_path):
    run = make_run(tmp_path, STAGES)
    directory = tmp_path / "checkpoints"
    folders = [directory / checkpoint_name(step) for step in (4, 8)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / MANIFEST_FILE).write_text("{")
    for message in run_ranks(2, rewind, run, directory):
        assert message.startswith(f"no valid checkpoint under {directory}: ")
    assert sorted(directory.iterdir()) == folders
