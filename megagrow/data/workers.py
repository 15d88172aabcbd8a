"""Run tasks in worker processes with progress messages; handles Ctrl-C and killed workers."""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import TypeVar

from megagrow.errors import InputError, ResourceError

Task = TypeVar("Task")
Message = TypeVar("Message")
TaskFunction = Callable[[Task], Iterator[Message]]
"""Function that performs a task and yields messages other than None."""


def run_tasks(
    start: Callable[[], TaskFunction[Task, Message]], tasks: Sequence[Task], workers: int
) -> Iterator[Message]:
    """Run all tasks and yield their messages as they arrive.

    `start` is called once per process and returns the task function. One worker runs in this
    process. With more, `start` and the tasks are sent to spawned processes, which end with this
    generator. Raises the first error of a worker, or ResourceError if a worker was killed.
    """
    workers = min(workers, len(tasks))
    if workers > 1:
        yield from _run_in_processes(start, tasks, workers)
    elif tasks:
        work = start()
        for task in tasks:
            yield from work(task)


def _run_in_processes(
    start: Callable[[], TaskFunction[Task, Message]], tasks: Sequence[Task], workers: int
) -> Iterator[Message]:
    context = multiprocessing.get_context("spawn")
    todo: Queue[Task | None] = context.Queue()
    results: Queue[Message | Exception | None] = context.Queue()
    for entry in (*tasks, *[None] * workers):
        todo.put(entry)
    arguments = (start, todo, results)
    processes = [
        context.Process(target=_serve, args=arguments, daemon=True) for _ in range(workers)
    ]
    try:
        with _interrupts_held():
            for process in processes:
                process.start()
        yield from _collect(processes, results)
    finally:
        todo.cancel_join_thread()
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT while workers start, so that they inherit the mask.

    Ctrl-C reaches all processes of a terminal; only the parent must act on it, even while the
    workers are still importing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(
    processes: Sequence[BaseProcess], results: "Queue[Message | Exception | None]"
) -> Iterator[Message]:
    """Yield messages until every process has sent None."""
    working = len(processes)
    while working:
        try:
            message = results.get(timeout=1)
        except queue.Empty:
            codes = [process.exitcode for process in processes if process.exitcode]
            if codes:
                raise ResourceError(
                    f"a worker process was killed (exit code {codes[0]}), possibly out of memory; "
                    "retry with fewer workers"
                ) from None
            continue
        if isinstance(message, Exception):
            raise message
        if message is None:
            working -= 1
        else:
            yield message


def _serve(
    start: Callable[[], TaskFunction[Task, Message]],
    todo: "Queue[Task | None]",
    results: "Queue[Message | Exception | None]",
) -> None:
    """Main function of a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = start()
        while (task := todo.get()) is not None:
            for message in work(task):
                results.put(message)
        results.put(None)
    except (InputError, OSError) as error:
        results.put(error)
    except Exception as error:
        # As text, since not every exception can be pickled.
        results.put(RuntimeError("".join(traceback.format_exception(error))))


def _end_with_parent() -> None:
    """End this process when its parent has ended, for example by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
