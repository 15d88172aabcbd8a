"""One rank of tools/regression/compare_commits.py: runs megagrow commands in forked processes.

Modules are imported once; each command is a fork of this process. Reads one JSON object per line
(folder, log, arguments) from standard input and answers each with the exit code. The first answer
is the path of the megagrow package. The launcher sets the rank variables.
"""

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PRELOADED = ("torch._dynamo", "megagrow.cli", "megagrow.run")
"""Modules to import in advance; missing ones are skipped."""

FORK = multiprocessing.get_context("fork")


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()
    print(importlib.import_module("megagrow").__file__, file=answers, flush=True)
    for line in sys.stdin:
        process = FORK.Process(target=run_command, args=(json.loads(line),))
        process.start()
        process.join()
        print(process.exitcode, file=answers, flush=True)


def run_command(command: dict[str, Any]) -> None:
    """Run `megagrow ARGUMENTS` in this process, in its folder, its output in a log file."""
    log = os.open(command["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.chdir(Path(command["folder"]))
    sys.argv = ["megagrow", *command["arguments"]]
    runpy.run_module("megagrow", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
