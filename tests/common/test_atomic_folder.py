"""A folder appears when all of it is written, and not before."""

import errno

import pytest

from megagrow.common.atomic_folder import new_folder
from megagrow.errors import InputError


def test_it_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / "a" / "out", 1) as folder:
        (folder / "x").write_text("1")
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.tmp"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", 1) as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    with (
        pytest.raises(InputError, match=r"out: cannot be written \(disk full\)"),
        new_folder(tmp_path / "out", 1),
    ):
        raise OSError(errno.ENOSPC, "disk full")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    for name in ("out", "out.tmp"):
        (tmp_path / name).mkdir()
        with (
            pytest.raises(InputError, match=rf"{name}: is there already"),
            new_folder(tmp_path / "out", 1),
        ):
            raise AssertionError
        (tmp_path / name).rmdir()


def test_room_is_looked_for_first(tmp_path):
    with (
        pytest.raises(InputError, match=r"of room, 8192 TiB are needed"),
        new_folder(tmp_path / "out", 2**53),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []
