"""Standard streams whose reader is lost continue in a file."""

import os
import sys
from io import StringIO
from pathlib import Path

import pytest

from megagrow.common.lasting_output import lasting_output, log_file


def open_writer(descriptor: int) -> None:
    """A standard output as Python opens it."""
    sys.stdout = os.fdopen(descriptor, "w", encoding="utf-8")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fallback, in a folder that does not exist yet; stdout is restored after the test."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    return log_file(tmp_path / "run", 3)


def test_a_reader_that_ends_loses_nothing(log: Path) -> None:
    read, write = os.pipe()
    open_writer(write)
    with lasting_output(log):
        print("one", flush=True)
        assert os.read(read, 100) == b"one\n"
        os.close(read)
        for text in ("two", "three"):
            print(text, flush=True)
        os.write(write, b"a library\n")
        print("four")
    sys.stdout.close()
    assert log.name == "train-rank-00003.log"
    first, *rest = log.read_text().splitlines()
    assert first.endswith("warning: standard output failed (Broken pipe); it continues here")
    assert rest == ["two", "three", "a library", "four"]


def test_a_reader_that_ended_before_the_start(log: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    open_writer(write)
    print("early")
    with lasting_output(log):
        print("late")
    sys.stdout.close()
    assert log.read_text().splitlines()[1:] == ["early", "late"]


def test_a_full_disk_behind_stdout(log: Path) -> None:
    open_writer(os.open("/dev/full", os.O_WRONLY))
    with lasting_output(log):
        print("x" * 100_000)
    sys.stdout.close()
    assert "(No space left on device)" in log.read_text()
    assert log.read_text().count("x") == 100_000


@pytest.mark.parametrize("kind", ["a device", "a link"])
def test_without_a_fallback_output_is_dropped(log: Path, kind: str) -> None:
    log.parent.mkdir()
    (log.parent / "precious").touch()
    log.symlink_to("/dev/full" if kind == "a device" else log.parent / "precious")
    open_writer(os.open("/dev/full", os.O_WRONLY))
    with lasting_output(log):
        for _ in range(2):
            print("lost", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    assert (log.parent / "precious").read_text() == ""


def test_a_stream_without_a_file_is_left_alone(log: Path) -> None:
    sys.stdout = stream = StringIO()
    with lasting_output(log):
        print("text")
    assert stream.getvalue() == "text\n" and not log.exists()


def test_a_shared_pipe_that_does_not_block_is_waited_for(log: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    open_writer(write)
    size, child = 1 << 20, os.fork()
    if child == 0:
        os.close(write)
        left = size
        while left:
            left -= len(os.read(read, 1 << 16))
        os._exit(0)
    with lasting_output(log):
        print("x" * size, end="", flush=True)
    assert os.waitpid(child, 0)[1] == 0
    sys.stdout.close()
    assert not log.exists()
