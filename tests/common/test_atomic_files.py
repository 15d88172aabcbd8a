"""Atomic files and folders."""

import errno

import pytest

from megagrow.common.atomic_files import atomic_file, atomic_folder, publish, write_text
from megagrow.errors import InputError


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
