"""Removal and replacement of checkpoints: links, foreign folders, busy files, crashes."""

import errno
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from megagrow.checkpoint.discovery import checkpoint_name, list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.checkpoint.removal import (
    finish_replacements,
    hide_checkpoint,
    publish_checkpoint,
    remove_unfinished,
)
from megagrow.checkpoint.retention import Retention, has_right_sizes, prune_checkpoints
from megagrow.checkpoint.save import Save
from megagrow.errors import CheckpointError
from tests.helpers.checkpoint.damage import DAMAGES, STEPS, truncate
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of

LAYOUT = layout_of(MODEL, 1, 2, 1)
STATE = random_state(LAYOUT.plan)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks after 9, 10 and 100 steps."""
    folder = tmp_path_factory.mktemp("good") / "c"
    for step in STEPS:
        write_checkpoint(folder / checkpoint_name(step), MODEL, LAYOUT, STATE)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "c")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def moved_and_linked(path: Path) -> None:
    """The checkpoint is elsewhere; a link has its name."""
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


def test_a_link_is_removed_and_its_target_is_kept(folder: Path) -> None:
    moved_and_linked(folder / checkpoint_name(9))
    prune_checkpoints(folder, Retention(2), has_right_sizes)
    assert names(folder) == [*map(checkpoint_name, (10, 100))]
    read_manifest(folder.parent / "elsewhere")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a file more": lambda path: (path / "notes.txt").write_text("mine"),
    "a folder more": lambda path: (path / "rank-00009.safetensors").mkdir(),
    "no checkpoint": lambda path: [shutil.rmtree(path), path.mkdir(), (path / "x").touch()],
    "other format": DAMAGES["other format"][0],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_a_checkpoint_of_this_version_is_kept(folder: Path, kind: str) -> None:
    FOREIGN[kind](folder / checkpoint_name(9))
    with captured_logs() as messages:
        for _ in range(2):
            prune_checkpoints(folder, Retention(1), has_right_sizes)
    assert names(folder) == [*map(checkpoint_name, (9, 100))]
    (line,) = messages
    assert line.startswith(f"checkpoint {folder / checkpoint_name(9)} cannot be removed (")


def busy(*_: object, **__: object) -> None:
    raise OSError(errno.EBUSY, "Device or resource busy")


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_a_busy_checkpoint_is_removed_later(
    folder: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = os if call == "rename" else shutil
    with captured_logs() as messages:
        with monkeypatch.context() as patch:
            patch.setattr(place, call, busy)
            for _ in range(2):
                prune_checkpoints(folder, Retention(2), has_right_sizes)
            assert [path.name for path in list_checkpoints(folder)][-2:] == [
                *map(checkpoint_name, (10, 100))
            ]
        prune_checkpoints(folder, Retention(2), has_right_sizes)
    assert names(folder) == [*map(checkpoint_name, (10, 100))]
    (line,) = messages
    assert "(Device or resource busy)" in line


def test_a_leftover_that_cannot_be_removed_does_not_block_a_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = folder / f"{checkpoint_name(101)}.tmp"
    shutil.copytree(folder / checkpoint_name(100), left)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        partial = Save(folder, 101)._begin(0)
    assert partial.is_dir() and partial != left
    linked = folder / f"{checkpoint_name(102)}.tmp"
    linked.symlink_to(folder / checkpoint_name(9))
    assert Save(folder, 102)._begin(0) == linked and not linked.is_symlink()
    assert names(folder) == [*map(checkpoint_name, STEPS), linked.name]
    read_manifest(folder / checkpoint_name(9))


def test_a_foreign_folder_of_the_same_name_is_renamed(folder: Path) -> None:
    final = folder / checkpoint_name(9)
    (final / "notes.txt").write_text("mine")
    publish_checkpoint((folder / checkpoint_name(10)).rename(folder / "new"), final)
    assert names(folder) == [
        checkpoint_name(9),
        f"{checkpoint_name(9)}.kept.1",
        checkpoint_name(100),
    ]
    assert (folder / f"{checkpoint_name(9)}.kept.1" / "notes.txt").read_text() == "mine"
    read_manifest(final)


def test_a_rewind_never_hides_a_foreign_folder(folder: Path) -> None:
    (folder / checkpoint_name(100) / "notes.txt").write_text("mine")
    for step in (10, 100):
        hide_checkpoint(folder / checkpoint_name(step))
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, (9, 100))]


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that is killed before its system call `number` on the
    directory; False if there are not so many."""
    child = os.fork()
    if child == 0:
        calls = count()

        def limited(call: Callable[..., object]) -> Callable[..., object]:
            def before(*args: object, **options: object) -> object:
                if next(calls) == number:
                    os._exit(9)
                return call(*args, **options)

            return before

        for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
            setattr(os, name, limited(getattr(os, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("damage", [truncate, lambda path: None], ids=["damaged", "valid"])
def test_killed_while_one_checkpoint_replaces_another(
    good: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    for number in count():
        folder = shutil.copytree(good, tmp_path / str(number))
        final, partial = folder / checkpoint_name(9), folder / f"{checkpoint_name(9)}.tmp"
        shutil.copytree(final, partial)
        damage(final)
        new = os.stat(partial).st_ino
        killed = killed_at(
            number, lambda partial=partial, final=final: publish_checkpoint(partial, final)
        )
        finish_replacements(folder)
        assert final.is_dir(), f"lost at system call {number}"
        if final.stat().st_ino == new:
            read_manifest(final)
        remove_unfinished(folder)
        assert names(folder) == [*map(checkpoint_name, STEPS)]
        if not killed:
            assert final.stat().st_ino == new
            break
    assert number > 5


def test_a_replacement_by_an_incomplete_checkpoint_is_undone(folder: Path) -> None:
    old = (folder / checkpoint_name(9)).rename(folder / f"{checkpoint_name(9)}.old.tmp")
    incomplete = folder / f"{checkpoint_name(9)}.tmp"
    incomplete.mkdir()
    finish_replacements(folder)
    assert not old.exists() and incomplete.exists()
    read_manifest(folder / checkpoint_name(9))


def test_a_leftover_of_a_removal_is_not_published(folder: Path) -> None:
    hide_checkpoint(folder / checkpoint_name(100))
    finish_replacements(folder)
    assert [path.name for path in list_checkpoints(folder)] == [*map(checkpoint_name, (9, 10))]
    with pytest.raises(CheckpointError):
        read_manifest(folder / checkpoint_name(100))
