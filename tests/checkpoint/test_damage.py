"""A damaged checkpoint is named and passed over; pruning never leaves only damaged ones."""

import os
import shutil
from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name, list_checkpoints
from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.errors import InputError
from tests.helpers.checkpoint.damage import DAMAGES, SHARD, STEPS, damaged, flip, truncate
from tests.helpers.checkpoint.saving import MODEL, save_random
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.definition import empty_storage
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks

WORLD = 2
LAYOUT = layout_of(MODEL, 1, 2, 1)


def save_steps(folder: Path) -> None:
    for step in STEPS:
        save_random(folder, step, LAYOUT)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    run_ranks(WORLD, save_steps, folder)
    return folder


def search(folders: list[Path]) -> list[tuple[str, list[str]]]:
    """For each folder what is found, or why nothing is, and what was said meanwhile."""
    out = []
    for folder in folders:
        with captured_logs() as messages:
            try:
                found = newest_valid_on_all_ranks(folder)
                out.append((found[0].name if found else "none", messages))
            except InputError as error:
                out.append((str(error), messages))
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
        assert f"no valid checkpoint under {everything[index]}: " in none[0], name
        assert text in none[0] and "\n" not in none[0] and len(none[1]) == 3, name
    assert found[-2:] == [(checkpoint_name(100), []), ("none", [])]


def load_later(folder: Path) -> str:
    """Message about a shard that is damaged between the search and the loading."""
    path, manifest = newest_valid_on_all_ranks(folder)
    (path / SHARD).write_bytes(b"\xff" * manifest.files[SHARD].size)
    try:
        whole = layout_of(MODEL, 0, 1, 1)
        load_storage(path, manifest, whole, empty_storage(whole, 0))
    except InputError as error:
        return str(error)
    return "loaded"


@pytest.mark.dist
def test_a_shard_that_is_no_shard_is_named_when_read(good, tmp_path):
    folder = damaged(good, tmp_path / "scribbled", truncate, (9,))
    (error,) = run_ranks(1, load_later, folder)
    assert f"{folder / checkpoint_name(100) / SHARD}: cannot be read" in error


@pytest.mark.dist
def test_all_damaged_files_are_named(good, tmp_path):
    def spoil(path: Path) -> None:
        flip(path)
        (path / "rank-00000.safetensors").unlink()

    folder = damaged(good, tmp_path / "c", spoil, (100,))
    found = run_ranks(WORLD, search, [folder])
    ((name, (said,)),) = found[0]
    assert name == checkpoint_name(10)
    assert "rank-00000.safetensors is missing" in said and f"{SHARD}: damaged" in said


@pytest.mark.dist
def test_no_clock_decides_which_one_is_the_newest(good, tmp_path):
    folder = damaged(good, tmp_path / "c", lambda path: None, ())
    for step, year in ((9, 2100), (10, 2090), (100, 1980)):
        path = folder / checkpoint_name(step)
        for file in (*path.iterdir(), path):
            os.utime(file, (0, (year - 1970) * 365.25 * 86400))
    assert run_ranks(WORLD, search, [folder]) == [[(checkpoint_name(100), [])]] * WORLD


def test_checkpoints_are_listed_by_step_and_unfinished_ones_not_at_all(good, tmp_path):
    shutil.copytree(good, tmp_path / "c")
    (tmp_path / "c" / "step-000000200.tmp").mkdir()
    (tmp_path / "c" / "step-000000300").touch()
    (tmp_path / "c" / "notes").mkdir()
    (tmp_path / "c" / "step-1234567890").mkdir()
    names = [path.name for path in list_checkpoints(tmp_path / "c")]
    assert names == [*map(checkpoint_name, STEPS), "step-1234567890"]
    assert list_checkpoints(tmp_path / "nothing there") == []
