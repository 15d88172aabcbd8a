"""A journal remembers what is on the disk, for the same command alone."""

from pathlib import Path

import pytest

from megagrow.errors import InputError
from megagrow.offline.journal import JOURNAL_FILE, Journal

COMMAND = {"to": [1, 2], "from": "a"}


def lines(folder: Path) -> list[bytes]:
    return (folder / JOURNAL_FILE).read_bytes().splitlines()


def begin(folder: Path) -> None:
    (folder / "data").write_bytes(b"x")
    with Journal(folder, COMMAND) as journal:
        for piece in range(3):
            journal.add(piece, 10 + piece, folder / "data", 1)
        assert journal.done == {} and len(lines(folder)) == 1
        journal.commit()
        assert journal.done == {0: 10, 1: 11, 2: 12} and len(lines(folder)) == 4


@pytest.fixture
def folder(tmp_path) -> Path:
    with Journal(tmp_path, COMMAND):
        pass
    begin(tmp_path)
    return tmp_path


def test_the_same_command_goes_on(folder):
    with Journal(folder, COMMAND) as journal:
        assert journal.done == {0: 10, 1: 11, 2: 12}
        journal.void(1)
    with Journal(folder, COMMAND) as journal:
        assert journal.done == {0: 10, 2: 12}
        journal.add(1, 21, folder / "data", 2**30)  # so much that it is made sure of at once
        assert journal.done[1] == 21


def test_another_command_is_refused(folder):
    with pytest.raises(InputError, match=r"started by another command \(other to\)"):
        Journal(folder, COMMAND | {"to": [1, 3]})
    with pytest.raises(InputError, match=r"\(other new, to\)"):
        Journal(folder, {"from": "a", "new": 1})


def test_a_command_that_still_runs_is_left_alone(folder):
    with (
        Journal(folder, COMMAND),
        pytest.raises(InputError, match="another process is writing to it"),
    ):
        Journal(folder, COMMAND)


@pytest.mark.parametrize("cut", [b"[3, 1", b"[", b'{"x'])
def test_a_line_that_a_crash_has_cut_counts_for_nothing(folder, cut):
    with (folder / JOURNAL_FILE).open("ab") as file:
        file.write(cut)
    with Journal(folder, COMMAND) as journal:
        assert journal.done == {0: 10, 1: 11, 2: 12}
        journal.add(7, 70, folder / "data", 2**30)
    with Journal(folder, COMMAND) as journal:
        assert journal.done == {0: 10, 1: 11, 2: 12, 7: 70}


def test_a_first_line_that_a_crash_has_cut_is_written_anew(tmp_path):
    (tmp_path / JOURNAL_FILE).write_bytes(b'{"to": [1')
    with Journal(tmp_path, COMMAND):
        assert len(lines(tmp_path)) == 1
    begin(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "data").write_bytes(b"precious")
    with pytest.raises(InputError, match="exists but is not an unfinished growth; remove it"):
        Journal(tmp_path, COMMAND)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_command_recorded_under_deprecated_names_continues(tmp_path):
    old = {"growth": {"options": {"layers": [0, 0], "literal": False, "optimizer_state": "keep_v"}}}
    new = {"layer_map": [0, 0], "paper_exact": False, "optimizer_state": "keep_second_moment"}
    with Journal(tmp_path, old):
        pass
    with Journal(tmp_path, {"growth": {"options": new}}):
        pass
    with pytest.raises(InputError, match=r"\(other growth\)"):
        Journal(tmp_path, {"growth": {"options": new | {"paper_exact": True}}})
