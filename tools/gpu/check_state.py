"""Results of a GPU check on disk, written after each part and read by the next run of the check."""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from megagrow.common.atomic_files import write_text
from tools.gpu.bench.goals import BenchmarkResults, goal_rows
from tools.gpu.check_parts import ROOT, PartResult, read_lines
from tools.gpu.check_tables import failures, report

RESULTS = "gpu_check.json"
GOAL_COLUMNS = ("goal", "bound", "measured", "met")
CODE = ("megagrow", "kernels", "tests", "tools")


class CheckState:
    """Results of the parts of a check, in OUTPUT/gpu_check.json."""

    def __init__(self, output: Path, smoke: bool) -> None:
        """Open or create the output folder.

        Exits with 2 if it is not from a check, or from a check of another machine or other code.
        """
        self.output, self._smoke, self._machine = output, smoke, environment_info()
        self.outcomes: dict[str, PartResult] = {}
        path = output / RESULTS
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if (found["machine"], found["smoke"]) != (self._machine, smoke):
                _refuse(f"{output} has the results of another machine or of other code")
            self.outcomes = {part["name"]: PartResult(**part) for part in found["parts"]}
        elif output.exists():
            _refuse(f"{output} exists and is not a result of gpu_check")
        else:
            output.mkdir(parents=True)
            self.write()

    def add(self, outcome: PartResult) -> None:
        """Record the outcome of a part and write the file."""
        self.outcomes[outcome.name] = outcome
        self.write()

    def results(self) -> BenchmarkResults:
        """Return the records of all parts."""
        return BenchmarkResults(read_records(self.outcomes.values(), self.output))

    def write(self) -> None:
        """Replace the file atomically."""
        results = self.results()
        goals = [] if self._smoke else goal_rows(results)
        summary: dict[str, Any] = {
            "smoke": self._smoke,
            "machine": self._machine,
            "parts": [vars(outcome) for outcome in self.outcomes.values()],
            "goals": [dict(zip(GOAL_COLUMNS, row, strict=True)) for row in goals],
            "records": results.records,
        }
        write_text(self.output / RESULTS, json.dumps(summary, indent=1))

    def finish(self, names: Sequence[str]) -> int:
        """Print the tables and return the exit code for the parts of these names."""
        results = self.results()
        print(*self._machine.values(), sep=", ")
        print("\n".join(report(self.outcomes.values(), results, self._smoke)))
        success = all(self.outcomes[name].good for name in names) and not failures(results)
        return 0 if success else 1


def _refuse(problem: str) -> None:
    print(f"{problem}; choose another --output", file=sys.stderr)
    sys.exit(2)


def read_records(outcomes: Iterable[PartResult], output: Path) -> list[dict[str, Any]]:
    """Return the records of all parts, each with the name of its part.

    An incomplete last line, from a part that was cut, is skipped.
    """
    return [
        {"part": outcome.name} | record
        for outcome in outcomes
        for path in sorted(output.glob(f"{outcome.name}*.jsonl"))
        for record in read_lines(path)
    ]


def environment_info() -> dict[str, str]:
    """Return the device name, the library versions and a digest of the code."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "no GPU",
        "torch": f"torch {torch.__version__}",
        "cuda": f"CUDA {torch.version.cuda}",
        "triton": f"triton {triton.__version__}",
        "code": f"code {_code_digest()}",
    }


def _code_digest() -> str:
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
