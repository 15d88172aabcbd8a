"""A damaged checkpoint is named and passed over; pruning never leaves only damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.checkpoint.files import checkpoint_name, list_checkpoints
from megagrow.checkpoint.load import load_storage, newest_checkpoint
from megagrow.checkpoint.manifest import read_manifest
from megagrow.checkpoint.save import prune_checkpoints
from megagrow.errors import InputError
from tests.checkpoint.saving import MODEL, save_random
from tests.reshard.definition import empty_storage
from tests.reshard.models import layout_of
from tests.spawn import run_ranks

WORLD = 2
LAYOUT = layout_of(MODEL, 1, 2, 1)
STEPS = (9, 10, 100)
SHARD = "rank-00001.safetensors"


def truncate(path: Path) -> None:
    file = path / SHARD
    file.write_bytes(file.read_bytes()[:-1])


def rewrite(**changes: object) -> Callable[[Path], None]:
    """Changes fields of the manifest."""

    def damage(path: Path) -> None:
        file = path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "truncated shard": (truncate, f"{SHARD}: truncated or damaged"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "damaged"),
    "cut manifest": (lambda path: (path / "manifest.json").write_text('{"model": {'), "damaged"),
    "binary manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"), "damaged"),
    "other json": (lambda path: (path / "manifest.json").write_text("[1, 2]"), "damaged"),
    "field missing": (lambda path: (path / "manifest.json").write_text("{}"), "damaged"),
    "other format": (rewrite(format=2), "written in format 2, this version reads 1"),
}
"""What happens to a checkpoint, and what is said of it."""


def save_steps(folder: Path) -> None:
    for step in STEPS:
        save_random(folder, step, LAYOUT)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    run_ranks(WORLD, save_steps, folder)
    return folder


def damaged(good: Path, folder: Path, damage: Callable, steps: tuple[int, ...]) -> Path:
    """A copy of the good checkpoints, some of them damaged."""
    shutil.copytree(good, folder)
    for step in steps:
        damage(folder / checkpoint_name(step))
    return folder


def search(folders: list[Path]) -> list[tuple[str, list[str]]]:
    """For each folder what is found, or why nothing is, and what was said meanwhile."""
    out = []
    for folder in folders:
        said: list[str] = []
        try:
            found = newest_checkpoint(folder, said.append)
            out.append((found[0].name if found else "none", said))
        except InputError as error:
            out.append((str(error), said))
    return out


@pytest.mark.dist
def test_damaged_ones_are_named_and_the_one_before_is_taken(good, tmp_path):
    newest, two, everything = [
        [damaged(good, tmp_path / f"{n} {name}", d, steps) for name, (d, _) in DAMAGES.items()]
        for n, steps in enumerate(((100,), (10, 100), STEPS))
    ]
    others = [good, tmp_path / "nothing there"]
    by_rank = run_ranks(WORLD, search, [*newest, *two, *everything, *others])
    found = by_rank[0]
    assert [[text for text, _ in rank] for rank in by_rank] == [[text for text, _ in found]] * WORLD
    assert all(said == [] for _, said in by_rank[1]), "one rank speaks for all"
    count = len(DAMAGES)
    for index, (name, (_, text)) in enumerate(DAMAGES.items()):
        one, more, none = (found[index + n * count] for n in range(3))
        assert one[0] == checkpoint_name(10) and more[0] == checkpoint_name(9), name
        assert [text in line and checkpoint_name(100) in line for line in one[1]] == [True], name
        assert [text in line for line in more[1]] == [True, True], name
        assert f"no checkpoint under {everything[index]} is whole: " in none[0], name
        assert text in none[0] and "\n" not in none[0] and len(none[1]) == 3, name
    assert found[-2:] == [(checkpoint_name(100), []), ("none", [])]


def load_scribbled(folder: Path) -> str:
    path, manifest = newest_checkpoint(folder, print)
    try:
        whole = layout_of(MODEL, 0, 1, 1)
        load_storage(path, manifest, whole, empty_storage(whole, 0))
    except InputError as error:
        return str(error)
    return "loaded"


@pytest.mark.dist
def test_a_shard_that_is_no_shard_is_named_when_read(good, tmp_path):
    def scribble(path: Path) -> None:
        file = path / SHARD
        file.write_bytes(b"\xff" * file.stat().st_size)

    folder = damaged(good, tmp_path / "scribbled", scribble, (100,))
    (error,) = run_ranks(1, load_scribbled, folder)
    assert f"{folder / checkpoint_name(100) / SHARD}: cannot be read" in error


def test_checkpoints_are_listed_by_step_and_unfinished_ones_not_at_all(good, tmp_path):
    shutil.copytree(good, tmp_path / "c")
    (tmp_path / "c" / "step-000000200.tmp").mkdir()
    (tmp_path / "c" / "step-000000300").touch()
    (tmp_path / "c" / "notes").mkdir()
    (tmp_path / "c" / "step-1234567890").mkdir()
    names = [path.name for path in list_checkpoints(tmp_path / "c")]
    assert names == [*map(checkpoint_name, STEPS), "step-1234567890"]
    assert list_checkpoints(tmp_path / "nothing there") == []


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [100]), (2, [10, 100]), (3, [9, 10, 100]), (9, STEPS)]
)
def test_pruning_keeps_the_newest(good, tmp_path, keep, left):
    shutil.copytree(good, tmp_path / "c")
    prune_checkpoints(tmp_path / "c", keep)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [*map(checkpoint_name, left)]
    for path in list_checkpoints(tmp_path / "c"):
        read_manifest(path)


def test_a_crash_while_pruning_does_not_stop_the_next_one(good, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(good, folder)
    half = (folder / checkpoint_name(9)).rename(folder / f"{checkpoint_name(9)}.tmp")
    (half / "manifest.json").unlink()
    prune_checkpoints(folder, keep_last=2)
    assert sorted(path.name for path in folder.iterdir()) == [*map(checkpoint_name, (10, 100))]


def test_old_damaged_ones_go_too(good, tmp_path):
    folder = damaged(good, tmp_path / "c", DAMAGES["no manifest"][0], (9,))
    prune_checkpoints(folder, keep_last=2)
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, (10, 100))]


def test_where_none_is_whole_none_is_removed(good, tmp_path):
    folder = damaged(good, tmp_path / "c", truncate, STEPS)
    prune_checkpoints(folder, keep_last=1)
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, STEPS)]


@pytest.mark.parametrize("name", DAMAGES)
def test_pruning_does_not_count_damaged_ones(good, tmp_path, name):
    # Step 100 was passed over, the run went on from 9 and has just saved 10.
    folder = damaged(good, tmp_path / "c", DAMAGES[name][0], (100,))
    prune_checkpoints(folder, keep_last=1)
    left = list_checkpoints(folder)
    assert left[0].name == checkpoint_name(10)
    read_manifest(left[0])
