"""Compiles kernels into Triton's cache, for a GPU that is not touched, beside the work of others.

    python -m megagrow_kernels.warm_up 90 < calls.json

The argument is the compute capability of the GPU, 90 for an H100; calls.json is a list of pairs
[op, arguments], as `calls.launches` takes them. A call that cannot be compiled is told of
on stderr, and the others are compiled all the same; the exit code is then 1.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megagrow_kernels.calls import launches
from megagrow_kernels.compiling import compile_for

LOW_PRIORITY = 10


def warm_up(calls: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Compiles all kernels of the calls for the active target; returns what went wrong."""
    problems = []
    for op, arguments in calls:
        try:
            for launch in launches(op, torch.device("meta"), arguments).values():
                launch()
        except Exception as error:  # a compiler's errors have no common class
            problems.append(f"{op} {dict(arguments)}: {type(error).__name__}: {error}")
    return problems


def main() -> None:
    """Reads the calls from stdin."""
    capability = int(sys.argv[1])
    os.nice(LOW_PRIORITY)
    compile_for(capability)
    problems = warm_up(json.load(sys.stdin))
    for problem in problems:
        print(problem.replace("\n", " "), file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
