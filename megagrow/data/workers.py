"""Work spread over processes, with messages on the way, clean on Ctrl-C, never hanging."""

import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import TypeVar

from megagrow.errors import InputError

Task = TypeVar("Task")
Message = TypeVar("Message")
Start = Callable[[], Callable[[Task], Iterator[Message]]]
"""Called once in each process; gives the function that does a task and yields messages."""


def run_tasks(start: Start, tasks: Sequence[Task], workers: int) -> Iterator[Message]:
    """Do all tasks and yield their messages as they come.

    One worker works in this process. With more, `start` and the tasks are sent to spawned
    processes, which end with this generator, whatever ends it. Errors: the first one of a worker;
    InputError if a worker was killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        work = start() if tasks else None
        for task in tasks:
            yield from work(task)
        return
    context = multiprocessing.get_context("spawn")
    todo, results = context.Queue(), context.Queue()
    for task in (*tasks, *[None] * workers):
        todo.put(task)
    arguments = (start, todo, results)
    processes = [
        context.Process(target=_serve, args=arguments, daemon=True) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        yield from _collect(processes, results)
    finally:
        todo.cancel_join_thread()
        for process in processes:
            process.terminate()
            process.join()


def _collect(processes: list[BaseProcess], results: Queue) -> Iterator[object]:
    """Messages until every process has said that it is done (None)."""
    working = len(processes)
    while working:
        try:
            message = results.get(timeout=1)
        except queue.Empty:
            codes = [process.exitcode for process in processes if process.exitcode]
            if codes:
                raise InputError(
                    f"a worker process was ended from outside (exit code {codes[0]}), perhaps for "
                    "lack of memory; try again with fewer workers"
                ) from None
            continue
        if isinstance(message, BaseException):
            raise message
        if message is None:
            working -= 1
        else:
            yield message


def _serve(start: Start, todo: Queue, results: Queue) -> None:
    """The life of a worker process."""
    # Ctrl-C reaches all processes of the terminal; the parent is the one that acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    try:
        work = start()
        while parent.is_alive() and (task := todo.get()) is not None:
            for message in work(task):
                results.put(message)
        results.put(None)
    except (InputError, OSError) as error:
        results.put(error)
    except Exception as error:
        # As text, since not every exception can be sent.
        results.put(RuntimeError("".join(traceback.format_exception(error))))
