"""Compile kernels into Triton's cache in a background process, without touching the GPU.

    python -m megagrow_kernels.warm_up 90 < calls.json

The argument is the compute capability of the GPU, 90 for an H100. calls.json is a list of pairs
[op, arguments] as `calls.launches` takes them. A call that fails to compile is reported on stderr,
the remaining calls are still compiled, and the exit code is 1.
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
    """Compile all kernels of the calls for the active target; return a message per failure."""
    problems = []
    for op, arguments in calls:
        try:
            for launch in launches(op, torch.device("meta"), arguments).values():
                launch()
        except Exception as error:  # compiler errors have no common class
            problems.append(f"{op} {dict(arguments)}: {type(error).__name__}: {error}")
    return problems


def main() -> None:
    """Read calls from stdin, compile them, and exit with 1 if any failed."""
    capability = int(sys.argv[1])
    os.nice(LOW_PRIORITY)
    compile_for(capability)
    problems = warm_up(json.load(sys.stdin))
    for problem in problems:
        print(problem.replace("\n", " "), file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
