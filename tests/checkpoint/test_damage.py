"""A damaged checkpoint is named and passed over; pruning never leaves only damaged ones."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.checkpoint.files import checkpoint_name, list_checkpoints
from megagrow.checkpoint.load import load_storage, newest_checkpoint
from megagrow.checkpoint.manifest import read_manifest, write_manifest
from megagrow.common.checksums import FileRecord
from megagrow.errors import InputError
from tests.helpers.checkpoint.saving import MODEL, save_random
from tests.helpers.reshard.definition import empty_storage
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks

WORLD = 2
LAYOUT = layout_of(MODEL, 1, 2, 1)
STEPS = (9, 10, 100)
SHARD = "rank-00001.safetensors"


def truncate(path: Path) -> None:
    file = path / SHARD
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit in the middle of a shard; the size stays."""
    content = bytearray((path / SHARD).read_bytes())
    content[len(content) // 2] ^= 16
    (path / SHARD).write_bytes(content)


def rewrite(**changes: object) -> Callable[[Path], None]:
    """Changes fields of the manifest."""

    def damage(path: Path) -> None:
        file = path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def escape(path: Path) -> None:
    """A manifest that is right in itself but names a file elsewhere."""
    manifest = read_manifest(path)
    write_manifest(path, replace(manifest, files=manifest.files | {"../x": FileRecord(1, "")}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "truncated shard": (truncate, f"{SHARD}: truncated or damaged"),
    "flipped bit": (flip, f"{SHARD}: damaged, its checksum is "),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "damaged"),
    "cut manifest": (lambda path: (path / "manifest.json").write_text('{"model": {'), "damaged"),
    "binary manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"), "damaged"),
    "other json": (lambda path: (path / "manifest.json").write_text("[1, 2]"), "damaged"),
    "field missing": (lambda path: (path / "manifest.json").write_text("{}"), "damaged"),
    "other format": (rewrite(format=1), "written in format 1, this version reads 2"),
    "changed manifest": (rewrite(adam_step=12), "its checksum is another one"),
    "file elsewhere": (escape, "names '../x', which is no rank's file"),
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
        assert f"no checkpoint under {everything[index]} is valid: " in none[0], name
        assert text in none[0] and "\n" not in none[0] and len(none[1]) == 3, name
    assert found[-2:] == [(checkpoint_name(100), []), ("none", [])]


def load_later(folder: Path) -> str:
    """What is said of a shard that is damaged between the search and the loading."""
    path, manifest = newest_checkpoint(folder, print)
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
