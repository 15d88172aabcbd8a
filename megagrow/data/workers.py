"""Worker processes: tasks with progress messages, and calls with limits of memory and time.

Ctrl-C and killed workers are handled.
"""

import importlib
import json
import multiprocessing
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import TypeVar

from megagrow.common.sizes import format_bytes
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


def run_limited(function: Callable[[str], str], text: str, memory: int, seconds: int) -> str:
    """Call a module's function in a new process with limited resources.

    Args:
        function: called with `text`; returns a problem or "". Its InputErrors are raised here,
            other exceptions except MemoryError are ignored.
        memory: bytes that it may allocate after its module is imported.
        seconds: CPU time.

    Returns the problem, also a limit that ended the process. Raises ResourceError if the process
    cannot be started.
    """
    arguments = (function.__module__, function.__name__, text, str(memory), str(seconds))
    # -P: a module in the current folder must not replace one of the child's.
    command = [sys.executable, "-P", "-c", _CALL, json.dumps(sys.path), *arguments]
    most, nothing = 20 * seconds, subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, stdin=nothing, capture_output=True, timeout=most, check=False
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {most} s"
    except OSError as error:
        raise ResourceError(f"no process can be started ({error.strerror})") from error
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {seconds} s of CPU time"
    if done.returncode < 0 or done.returncode == _OUT_OF_MEMORY:
        return f"takes more than {format_bytes(memory)} of memory"
    if done.returncode == _PROBLEM:
        return done.stdout.decode().splitlines()[-1]
    if done.returncode == _INPUT_ERROR:
        kind, _, message = done.stdout.decode().splitlines()[-1].partition(": ")
        raise _KINDS[kind](message)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [f"code {done.returncode}"]
        raise ResourceError(f"a process that was started for a check failed: {lines[-1]}")
    return ""


_CALL = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from megagrow.data.workers import call_limited
call_limited(*sys.argv[2:])
"""

_OUT_OF_MEMORY, _PROBLEM, _INPUT_ERROR = 3, 4, 5
"""Exit codes."""

_KINDS = {kind.__name__: kind for kind in InputError.__subclasses__()}


def call_limited(module: str, name: str, text: str, memory: str, seconds: str) -> None:
    """Call a function in this process within limits; the other side of `run_limited`."""
    function = getattr(importlib.import_module(module), name)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(memory),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        problem = function(text)
    except InputError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(_INPUT_ERROR)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException:  # also a panic of a Rust library, which occurs again in the caller
        os._exit(0)
    print(problem, flush=True)
    os._exit(_PROBLEM if problem else 0)


def _end_with_parent() -> None:
    """End this process when its parent has ended, for example by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
