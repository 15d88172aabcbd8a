"""A run that is started twice: the second start writes nothing while the first one trains."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from megagrow.common import directory_lock
from megagrow.common.directory_lock import NAME, DirectoryLock
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from tests.helpers.jobs import Job, records, train, write_run
from tests.helpers.logs import captured_logs
from tests.helpers.runs import STEP_TOKENS, make_run

ENDLESS = 100_000
"""Steps; nobody waits for the last one."""


@pytest.mark.dist
def test_nothing_of_a_run_changes_when_it_is_started_again(tmp_path: Path) -> None:
    first = start_endless(tmp_path)
    config, lock = tmp_path / "out" / "config.yaml", tmp_path / "out" / NAME
    before = config.read_bytes()
    stages = [{"tokens": 7 * STEP_TOKENS}]
    other = make_run(tmp_path, stages, output_dir=tmp_path / "out", name="second")
    done = train(write_run(tmp_path / "second.yaml", other), 2, at_once).finish()
    owner = f"process {first.ranks[0].pid} on {socket.gethostname()}"
    assert done.codes == [2, 2]
    assert f"{tmp_path / 'out'}: {owner} trains this run; wait until it has ended" in done.err[0]
    assert (config.read_bytes(), lock.read_text()) == (before, owner)
    first.signal(signal.SIGTERM)
    assert first.finish().codes == [0]
    steps = [step for (step,) in records(other, "train", ["step"])]
    assert steps == list(range(1, len(steps) + 1)) and records(other, "start", ["step"]) == [(0,)]


def test_a_start_waits_for_a_run_that_is_leaving(tmp_path: Path) -> None:
    first = start_endless(tmp_path)
    second = train(write_run(tmp_path / "second.yaml", endless(tmp_path)), 1)
    said = tmp_path / "second-output" / "0.out"
    second.wait_for(lambda: said.exists() and "still trains this run" in said.read_text())
    first.signal(signal.SIGTERM)
    assert first.finish().codes == [0]
    run = endless(tmp_path)
    second.wait_for(lambda: len(records(run, "start", ["step"])) == 2)
    second.signal(signal.SIGTERM)
    assert second.finish().codes == [0]
    begun = [step for (step,) in records(run, "start", ["step"])]
    assert begun[0] == 0 and begun[1] > 0


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    holds = context.Event()
    process = context.Process(target=hold, args=(tmp_path, holds))
    process.start()
    assert holds.wait(30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory_lock, "PATIENCE", 0.0)
        with pytest.raises(InputError, match=f"process {process.pid} on "):
            DirectoryLock(tmp_path)
    process.kill()
    process.join()
    with DirectoryLock(tmp_path):
        assert (tmp_path / NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_a_temporary_lock_is_removed_and_passed_on(tmp_path: Path) -> None:
    """The second owner has waited on a file that the first one removes."""
    context = multiprocessing.get_context("fork")
    holds, may_end = context.Event(), context.Event()
    process = context.Process(target=hold_until, args=(tmp_path, holds, may_end))
    process.start()
    assert holds.wait(30)
    with captured_logs() as messages, pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory_lock.time, "sleep", lambda _: may_end.set())
        with DirectoryLock(tmp_path, "writes here", "--output", temporary=True):
            owner = (tmp_path / NAME).read_text()
    process.join()
    assert messages == [
        f"{tmp_path}: process {process.pid} on {socket.gethostname()} still writes here; waiting "
        "for it to end"
    ]
    assert owner.startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with captured_logs() as messages, DirectoryLock(tmp_path):
        pass
    (line,) = messages
    assert line.startswith(f"{tmp_path}: this file system has no locks")


def endless(folder: Path) -> RunConfig:
    stages = [{"tokens": ENDLESS * STEP_TOKENS}]
    return make_run(folder, stages, output_dir=folder / "out", checkpoint={"interval": ENDLESS})


def start_endless(folder: Path) -> Job:
    """A run that has come to its third step."""
    run = endless(folder)
    job = train(write_run(folder / "first.yaml", run), 1)
    job.wait_for(lambda: len(records(run, "train", ["step"])) > 2)
    return job


def at_once(rank: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(directory_lock, "PATIENCE", 0.0)


def hold_until(directory: Path, holds: Any, may_end: Any) -> None:
    with DirectoryLock(directory, temporary=True):
        holds.set()
        may_end.wait(30)


def hold(directory: Path, holds: Any) -> None:
    with DirectoryLock(directory):
        holds.set()
        signal.pause()
