"""Compile kernels into Triton's cache in a background process, without touching the GPU.

    python -m megagrow_kernels.warm_up 90 [PROCESSES] < calls.json

The first argument is the compute capability of the GPU, 90 for an H100. calls.json is a list of
pairs [op, arguments] as `calls.launches` takes them. A call that fails to compile is reported on
stderr, the remaining calls are still compiled, and the exit code is 1. More than one process
compile the calls in parallel.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megagrow_kernels.calls import launches
from megagrow_kernels.compiling import compile_for

LOW_PRIORITY = 10

Call = tuple[str, Mapping[str, Any]]
"""An op and its arguments, as `calls.launches` takes them."""


def warm_up(calls: Iterable[Call]) -> list[str]:
    """Compile all kernels of the calls for the active target; return a message per failure."""
    problems = []
    for op, arguments in calls:
        try:
            for launch in launches(op, torch.device("meta"), arguments).values():
                launch()
        except Exception as error:  # compiler errors have no common class
            problems.append(f"{op} {dict(arguments)}: {type(error).__name__}: {error}")
    return problems


def warm_up_in_parallel(calls: Sequence[Call], capability: int, processes: int) -> bool:
    """Compile all kernels of the calls in parallel processes; return True if none failed.

    Each call is compiled by one process; messages of failed calls are printed to stderr. The
    processes are forked, so this process must not have used a GPU.
    """
    context = multiprocessing.get_context("fork")
    shares = [calls[index::processes] for index in range(min(processes, len(calls)))]
    workers = [context.Process(target=_compile, args=(share, capability)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return all(worker.exitcode == 0 for worker in workers)


def _compile(calls: Sequence[Call], capability: int) -> None:
    """Compile the kernels of the calls in this process; exit with 1 if any failed."""
    compile_for(capability)
    problems = warm_up(calls)
    for problem in problems:
        print(problem.replace("\n", " "), file=sys.stderr)
    sys.exit(1 if problems else 0)


def main() -> None:
    """Read calls from stdin, compile them with low priority, and exit with 1 if any failed."""
    capability, processes = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    os.nice(LOW_PRIORITY)
    calls = json.load(sys.stdin)
    if processes == 1:  # a single process can be ended by its parent
        _compile(calls, capability)
    sys.exit(0 if warm_up_in_parallel(calls, capability, processes) else 1)


if __name__ == "__main__":
    main()
