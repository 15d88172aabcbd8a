"""Fuzz all file loaders with many damaged and hostile inputs.

    python -m tests.fuzz --examples 10000

Runs the targets of tests/fuzz on more inputs. Prints the number of successful loads, clear errors
and failures per target; the exit code is 1 if there are failures. Needs the packages of the tests
(hypothesis).
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.fuzz.test_fuzz import TARGETS  # noqa: E402
from tests.helpers.fuzz.running import run  # noqa: E402

ROW = "{:<26}{:>9}{:>13}{:>14}{:>10}{:>10}{:>12}"


def fuzz(
    examples: Annotated[int, typer.Option(help="Number of inputs per target.")] = 1000,
    seed: Annotated[int, typer.Option(help="Random seed of the inputs.")] = 0,
    only: Annotated[str, typer.Option(help="Run the targets whose name contains this.")] = "",
) -> None:
    """Fuzz all file loaders with damaged and hostile inputs."""
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
            outcome = run(target, examples, seed, folder)
        counts = (outcome.inputs, outcome.loads, outcome.refusals, len(outcome.failures))
        seconds = time.perf_counter() - begin
        times = (f"{seconds:.1f}", f"{outcome.slowest * 1000:.0f}")
        print(ROW.format(target.name.replace(" ", "-"), *counts, *times), flush=True)
        failures += [(target.name, *failure) for failure in outcome.failures.items()]
    for name, problem, value in failures:
        print(f"{name}, seed {seed}: {problem}\n    {value[:2000]}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(fuzz)
