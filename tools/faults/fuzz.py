"""Tries every loader of files on many damaged and hostile inputs: `tests/fuzz`, with more of them.

    python tools/faults/fuzz.py --examples 10000

Prints what came of each target; exit code 1 if any input led to something other than a right load
or a clear error. Needs the packages of the tests (hypothesis).
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
ROW = "{:<26}{:>9}{:>13}{:>14}{:>10}{:>10}{:>12}"


def fuzz(
    examples: Annotated[int, typer.Option(help="Inputs of each target.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed, the same inputs.")] = 0,
    only: Annotated[str, typer.Option(help="Targets whose name has this in it.")] = "",
) -> None:
    """Try damaged and hostile files on everything that reads one."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from tests.helpers.fuzz.running import run
    from tests.helpers.fuzz.targets import TARGETS

    columns = ("inputs", "right loads", "clear errors", "failures", "seconds", "slowest/ms")
    print(ROW.format("target", *columns), flush=True)
    failures = []
    for target in TARGETS:
        if only not in target.name:
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as outer:
            folder = Path(outer) / "inner"
            folder.mkdir()
            found = run(target, examples, seed, folder)
        counts = (found.inputs, found.loads, found.refusals, len(found.failures))
        seconds = time.perf_counter() - begin
        times = (f"{seconds:.1f}", f"{found.slowest * 1000:.0f}")
        print(ROW.format(target.name.replace(" ", "-"), *counts, *times), flush=True)
        failures += [(target.name, *failure) for failure in found.failures.items()]
    for name, problem, value in failures:
        print(f"{name}, seed {seed}: {problem}\n    {value[:2000]}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(fuzz)
