"""Worker processes: all tasks done, errors brought home, nothing left behind, no hang."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megagrow.data.workers import run_tasks
from megagrow.errors import InputError


def _start_squaring():
    def work(task: int) -> Iterator[tuple[int, int]]:
        if task == -1:
            raise InputError("task -1 is wrong")
        if task == -2:
            raise ZeroDivisionError("a bug")
        if task == -3:
            os.kill(os.getpid(), signal.SIGKILL)
        if task == -4:
            raise FileNotFoundError(2, "No such file", "lost.txt")
        yield task, task * task

    return work


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once(workers):
    done = sorted(run_tasks(_start_squaring, list(range(20)), workers))
    assert done == [(i, i * i) for i in range(20)]


def test_no_tasks_no_work():
    assert list(run_tasks(_start_squaring, [], 4)) == []


@pytest.mark.parametrize(
    ("task", "error", "text"),
    [
        (-1, InputError, "task -1 is wrong"),
        (-2, RuntimeError, "ZeroDivisionError: a bug"),
        (-3, InputError, "exit code -9"),
        (-4, FileNotFoundError, "lost.txt"),
    ],
)
def test_errors_come_home_and_all_processes_end(task, error, text):
    with pytest.raises(error, match=text):
        list(run_tasks(_start_squaring, [1, task, *range(50)], 2))
    assert multiprocessing.active_children() == []


def test_leaving_early_ends_all_processes():
    messages = run_tasks(_start_squaring, list(range(1000)), 2)
    next(messages)
    assert multiprocessing.active_children() != []
    messages.close()
    assert multiprocessing.active_children() == []


def _start_sleeping(folder):
    def work(task: int) -> Iterator[int]:
        (folder / f"{os.getpid()}").touch()
        time.sleep(600)
        yield task

    return work


def test_workers_end_with_a_killed_parent(tmp_path):
    def run() -> None:
        list(run_tasks(partial(_start_sleeping, tmp_path), [1, 2], 2))

    parent = multiprocessing.get_context("fork").Process(target=run)
    parent.start()
    deadline = time.monotonic() + 60
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.join()
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(process: int) -> bool:
    """Orphans whose end nobody has waited for are zombies."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
