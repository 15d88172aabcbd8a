"""Retention: a run keeps the newest valid checkpoints, those at an interval, and protected ones."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name, list_checkpoints
from megagrow.checkpoint.manifest import BEFORE_GROWTH, read_manifest, write_manifest
from megagrow.checkpoint.retention import Retention, prune_checkpoints
from tests.helpers.checkpoint.damage import DAMAGES, STEPS, damaged, truncate
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Checkpoints of two ranks after 9, 10 and 100 steps."""
    folder, layout = tmp_path_factory.mktemp("good") / "c", layout_of(MODEL, 1, 2, 1)
    for step in STEPS:
        write_checkpoint(folder / checkpoint_name(step), MODEL, layout, random_state(layout.plan))
    return folder


def protect(folder: Path, step: int) -> None:
    path = folder / checkpoint_name(step)
    write_manifest(path, replace(read_manifest(path), protected=BEFORE_GROWTH))


def left(folder: Path) -> list[int]:
    """The steps of the checkpoints; nothing else may be there."""
    paths = list_checkpoints(folder)
    assert sorted(folder.iterdir()) == paths
    return [int(path.name.removeprefix("step-")) for path in paths]


@pytest.mark.parametrize(
    ("keep", "steps"), [(1, [100]), (2, [10, 100]), (3, [9, 10, 100]), (9, STEPS)]
)
def test_pruning_keeps_the_newest(good, tmp_path, keep, steps):
    shutil.copytree(good, tmp_path / "c")
    prune_checkpoints(tmp_path / "c", Retention(keep))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        *map(checkpoint_name, steps)
    ]
    for path in list_checkpoints(tmp_path / "c"):
        read_manifest(path)


def test_a_crash_while_pruning_does_not_stop_the_next_one(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    half = (folder / checkpoint_name(9)).rename(folder / f"{checkpoint_name(9)}.tmp")
    (half / "manifest.json").unlink()
    prune_checkpoints(folder, Retention(2))
    assert sorted(path.name for path in folder.iterdir()) == [*map(checkpoint_name, (10, 100))]


def test_old_damaged_ones_go_too(good, tmp_path):
    folder = damaged(good, tmp_path / "c", DAMAGES["no manifest"][0], (9,))
    prune_checkpoints(folder, Retention(2))
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, (10, 100))]


def test_where_none_is_whole_none_is_removed(good, tmp_path):
    folder = damaged(good, tmp_path / "c", truncate, STEPS)
    prune_checkpoints(folder, Retention(1))
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, STEPS)]


@pytest.mark.parametrize(
    "name", sorted(DAMAGES.keys() - {"flipped bit"})
)  # sizes alone are compared
def test_pruning_does_not_count_damaged_ones(good, tmp_path, name):
    # Step 100 was passed over, the run went on from 9 and has just saved 10.
    folder = damaged(good, tmp_path / "c", DAMAGES[name][0], (100,))
    prune_checkpoints(folder, Retention(1))
    kept = list_checkpoints(folder)
    assert kept[0].name == checkpoint_name(10)
    read_manifest(kept[0])


@pytest.mark.parametrize(
    ("every", "steps"), [(3, [9, 100]), (9, [9, 100]), (10, [10, 100]), (100, [100]), (1, STEPS)]
)
def test_those_at_every_so_many_steps_stay(good, tmp_path, every, steps):
    shutil.copytree(good, tmp_path / "c")
    for _ in range(2):
        prune_checkpoints(tmp_path / "c", Retention(1, keep_every=every))
        assert left(tmp_path / "c") == list(steps)


def test_a_damaged_one_is_not_kept_for_its_step(good, tmp_path):
    folder = damaged(good, tmp_path / "c", truncate, (9,))
    prune_checkpoints(folder, Retention(1, keep_every=9))
    assert left(folder) == [100]


def test_protected_ones_stay(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    protect(folder, 9)
    prune_checkpoints(folder, Retention(1))
    assert left(folder) == [9, 100]
    truncate(folder / checkpoint_name(9))
    prune_checkpoints(folder, Retention(1))
    assert left(folder) == [9, 100], "what may have been the only copy is not removed by a run"
    prune_checkpoints(folder, Retention(1, protected=False))
    assert left(folder) == [100]


def test_protected_ones_do_not_count_as_the_newest(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    protect(folder, 10)
    prune_checkpoints(folder, Retention(2))
    assert left(folder) == [10, 100]
