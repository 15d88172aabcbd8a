"""Atomic files and folders."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.common import log_setup
from megagrow.common.atomic_files import (
    atomic_file,
    atomic_folder,
    make_folder,
    open_in_place,
    partial_path,
    publish,
    sync,
    write_text,
)
from megagrow.common.directory_lock import DirectoryLock
from megagrow.errors import InputError
from tests.helpers.logs import captured_logs


def test_folder_is_renamed_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "a" / "out", 1) as folder:
        (folder / "x").write_text("1")
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.tmp"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"


def test_failed_folder_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", 1) as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    with (
        pytest.raises(InputError, match=r"out: cannot be written \(disk full\)"),
        atomic_folder(tmp_path / "out", 1),
    ):
        raise OSError(errno.ENOSPC, "disk full")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused(tmp_path):
    for name in ("out", "out.tmp"):
        (tmp_path / name).mkdir()
        with (
            pytest.raises(InputError, match=rf"{name}: already exists"),
            atomic_folder(tmp_path / "out", 1),
        ):
            raise AssertionError
        (tmp_path / name).rmdir()


def test_disk_space_is_checked_first(tmp_path):
    with (
        pytest.raises(InputError, match=r"not enough disk space: .* free, 8192 TiB required"),
        atomic_folder(tmp_path / "out", 2**53),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_file_replaces_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_failed_file_keeps_the_old_one(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "path").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "path", "new")
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]


def test_publish_replaces_a_folder(tmp_path):
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    publish(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refusing(number: int, directories: bool) -> Callable[[int], None]:
    """A file system that refuses fsync, of directories or of files."""

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == directories:
            raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_a_file_system_without_fsync_of_directories_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(log_setup, "_warned", set())
    monkeypatch.setattr(os, "fsync", refusing(number, directories=True))
    with captured_logs() as messages:
        for text in ("one", "two"):
            write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "two"
    (line,) = messages
    assert line.startswith(f"{tmp_path}: the file system does not sync directories (")


@pytest.mark.parametrize(("number", "directories"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_another_failure_of_fsync_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, directories: bool
) -> None:
    path = tmp_path if directories else tmp_path / "file"
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refusing(number, directories))
    with pytest.raises(OSError, match=f"'{path}'"):
        sync(path)


def test_links_are_replaced_and_their_targets_kept(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / "file").symlink_to(target)
    partial_path(tmp_path / "file").symlink_to(target)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(InputError, match="lock: must be a regular file, not a link"):
        DirectoryLock(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: must be a regular file"):
        open_in_place(tmp_path / "pipe")
    assert target.read_text() == "precious"


def test_a_folder_may_be_a_link_with_a_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match=f"link: is a link to {tmp_path}/disk, which is not"):
        make_folder(tmp_path / "link")
    (tmp_path / "disk").mkdir()
    make_folder(tmp_path / "link" / "inside")
    assert (tmp_path / "disk" / "inside").is_dir()


def test_publish_replaces_a_link_to_a_folder(tmp_path: Path) -> None:
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / "out").symlink_to(tmp_path / "target")
    publish(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]
