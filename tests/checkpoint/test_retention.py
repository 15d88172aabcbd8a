"""Retention: a run keeps the newest valid checkpoints, those at an interval, and protected ones."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name, list_checkpoints, step_of
from megagrow.checkpoint.listing import problems_of
from megagrow.checkpoint.manifest import BEFORE_GROWTH, read_manifest, write_manifest
from megagrow.checkpoint.retention import Pruner, Retention, has_right_sizes, prune_checkpoints
from tests.helpers.checkpoint.damage import DAMAGES, STEPS, damaged, flip, truncate
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
    prune_checkpoints(tmp_path / "c", Retention(keep), has_right_sizes)
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
    prune_checkpoints(folder, Retention(2), has_right_sizes)
    assert sorted(path.name for path in folder.iterdir()) == [*map(checkpoint_name, (10, 100))]


def test_old_damaged_ones_go_too(good, tmp_path):
    folder = damaged(good, tmp_path / "c", DAMAGES["no manifest"][0], (9,))
    prune_checkpoints(folder, Retention(2), has_right_sizes)
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, (10, 100))]


def test_where_none_is_whole_none_is_removed(good, tmp_path):
    folder = damaged(good, tmp_path / "c", truncate, STEPS)
    prune_checkpoints(folder, Retention(1), has_right_sizes)
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, STEPS)]


@pytest.mark.parametrize(
    "name", sorted(DAMAGES.keys() - {"flipped bit"})
)  # sizes alone are compared
def test_pruning_does_not_count_damaged_ones(good, tmp_path, name):
    # Step 100 was passed over, the run went on from 9 and has just saved 10.
    folder = damaged(good, tmp_path / "c", DAMAGES[name][0], (100,))
    prune_checkpoints(folder, Retention(1), has_right_sizes)
    kept = list_checkpoints(folder)
    assert kept[0].name == checkpoint_name(10)
    read_manifest(kept[0])


@pytest.mark.parametrize(
    ("every", "steps"), [(3, [9, 100]), (9, [9, 100]), (10, [10, 100]), (100, [100]), (1, STEPS)]
)
def test_those_at_every_so_many_steps_stay(good, tmp_path, every, steps):
    shutil.copytree(good, tmp_path / "c")
    for _ in range(2):
        prune_checkpoints(tmp_path / "c", Retention(1, keep_every=every), has_right_sizes)
        assert left(tmp_path / "c") == list(steps)


def test_a_damaged_one_is_not_kept_for_its_step(good, tmp_path):
    folder = damaged(good, tmp_path / "c", truncate, (9,))
    prune_checkpoints(folder, Retention(1, keep_every=9), has_right_sizes)
    assert left(folder) == [100]


def test_protected_ones_stay(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    protect(folder, 9)
    prune_checkpoints(folder, Retention(1), has_right_sizes)
    assert left(folder) == [9, 100]
    truncate(folder / checkpoint_name(9))
    prune_checkpoints(folder, Retention(1), has_right_sizes)
    assert left(folder) == [9, 100], "what may have been the only copy is not removed by a run"
    prune_checkpoints(folder, Retention(1, protected=False), has_right_sizes)
    assert left(folder) == [100]


def test_protected_ones_do_not_count_as_the_newest(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    protect(folder, 10)
    prune_checkpoints(folder, Retention(2), has_right_sizes)
    assert left(folder) == [10, 100]


def pruner(folder: Path, keep: int, **results: bool) -> Pruner:
    """A pruner that knows the results of some verifications, by step."""
    made = Pruner(folder, Retention(keep))
    for step, valid in results.items():
        made.record(folder / checkpoint_name(int(step[1:])), valid)
    return made


def saved(folder: Path, made: Pruner, step: int) -> list[int]:
    """A save of another checkpoint: returns the steps that are verified meanwhile."""
    due = made.due(step)
    valid = next(path for path in list_checkpoints(folder) if not problems_of(path))
    shutil.copytree(valid, folder / checkpoint_name(step))
    for path in due:
        made.record(path, not problems_of(path))
    made.record(folder / checkpoint_name(step), True)
    made.start()
    made.wait()
    return [step_of(path) for path in due]


def test_a_flipped_bit_pushes_out_no_good_checkpoint(good, tmp_path):
    folder = damaged(good, tmp_path / "resumed", flip, (100,))
    made = pruner(folder, 2, s10=True)  # the run resumed from step 10
    assert saved(folder, made, 101) == [100]
    assert left(folder) == [10, 100, 101]
    assert saved(folder, made, 102) == [101]
    assert left(folder) == [101, 102]


def test_damage_after_the_first_verification_is_found(good, tmp_path):
    folder = damaged(good, tmp_path / "c", flip, (100,))
    made = pruner(folder, 2, s9=True, s10=True, s100=True)
    assert saved(folder, made, 101) == [100]
    assert left(folder) == [10, 100, 101]


def test_each_checkpoint_that_counts_is_verified(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    made = pruner(folder, 3, s100=True)
    assert saved(folder, made, 101) == [10], "not verified, and the oldest that counts"
    assert left(folder) == [10, 100, 101]
    assert saved(folder, made, 102) == [100]
    made.record(folder / checkpoint_name(101), False)
    assert saved(folder, made, 103) == [100]
    assert left(folder) == [100, 101, 102, 103]
    assert saved(folder, pruner(folder, 1), 104) == [] and left(folder) == [104]


def test_until_enough_are_verified_only_damaged_ones_are_removed(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    made = pruner(folder, 3, s9=False, s100=True)
    made.start()
    made.wait()
    assert left(folder) == [10, 100]
