"""The target of a rewind, among damaged checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from megagrow.config.schema import RunConfig
from megagrow.errors import CheckpointError, Diverged
from megagrow.train.reporting.metrics import Counters
from megagrow.train.resume import rewind_target
from megagrow.train.train_state import Guard, RunState
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import STEP_TOKENS, make_run
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

STAGES = [{"tokens": 640}]
INITIAL = RunState()


def rewind(run: RunConfig, directory: Path, state: RunState = INITIAL) -> str:
    try:
        found, state = rewind_target(run, directory, state, "a test")
    except (CheckpointError, Diverged) as error:
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


def test_a_rewind_from_a_checkpoint_to_itself_ends_the_run(tmp_path):
    run, layout = make_run(tmp_path, STAGES), layout_of(MODEL, 1, 1, 1)
    path = tmp_path / "checkpoints" / checkpoint_name(5)
    write_checkpoint(path, MODEL, layout, random_state(layout.plan))
    (message,) = run_ranks(
        1, rewind, run, path.parent, RunState(Counters(step=5, tokens=640)).unstable()
    )
    assert message == (
        "step 5: a test, and there is no checkpoint of an earlier step; to restart from the "
        f"initial state, move {path} elsewhere"
    )
    assert path.exists()


@pytest.mark.parametrize(("stopped", "target"), [((8,), 6), ((6, 8), 3), ((3, 6, 8), 8)])
def test_a_rewind_prefers_scheduled_checkpoints(tmp_path, stopped, target):
    run, layout = make_run(tmp_path, STAGES), layout_of(MODEL, 1, 1, 1)
    directory = tmp_path / "checkpoints"
    for step in (3, 6, 8):
        path = directory / checkpoint_name(step)
        write_checkpoint(path, MODEL, layout, random_state(layout.plan))
        manifest = read_manifest(path)
        position = RunState(Counters(step=step, tokens=step * STEP_TOKENS)).as_json()
        changes = {"run": position, "scheduled": step not in stopped}
        write_manifest(path, replace(manifest, **changes))
    failed = RunState(Counters(step=11, tokens=11 * STEP_TOKENS), guard=Guard(skipped=3))
    (message,) = run_ranks(1, rewind, run, directory, failed)
    assert message.endswith(f" {target}")
    assert checkpoint_name(target) in message
