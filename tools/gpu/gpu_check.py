"""Check megagrow on a machine with a GPU, in less than nine minutes.

    python tools/gpu/gpu_check.py [--output gpu_check] [--parts rows attention ...] [--smoke]

The parts, in order: all tests marked `gpu`; every kernel against hardware ceilings and other
libraries (`rows`, `attention`, `loss`); training steps of the 410M, 1.1B and 3B models; a growth of
the paper's 410M recipe; and the stall of a growth with and without kernel warm-up. Each part has a
time share, is cut at the end of it, and keeps the results measured until then. Short tables are
printed last; OUTPUT/gpu_check.json has all records.

Exit code 0 if all parts finish without an error in megagrow (a missed goal is not an error), 1
otherwise, 2 if a requirement is missing. --smoke makes every call once on the CPU, in Triton's
interpreter: its numbers are meaningless, but it verifies that the check itself works.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tools.gpu.check_parts import (  # noqa: E402
    CheckPart,
    Command,
    PartResult,
    TimeBudget,
    install_instructions,
    missing_packages,
    run_part,
)

RESULTS = "gpu_check.json"
GOAL_COLUMNS = ("goal", "bound", "measured", "met")
SHARES = {
    "tests": 90,
    "rows": 60,
    "attention": 90,
    "loss": 45,
    "training": 110,
    "growth": 55,
    "warm-up": 80,
}
"""Time share of each part in seconds. Their sum is ten seconds less than nine minutes."""


def main() -> None:
    """Run the parts, print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="run tiny shapes on the CPU; the numbers are meaningless",
    )
    options = parser.parse_args()
    check_requirements(options.smoke)
    output = options.output.resolve()
    prepare_output(output)
    parts = [make_part(name, output, options.smoke) for name in options.parts]
    outcomes = []
    budget = TimeBudget(parts)
    for part in parts:
        limit = budget.left(part.name)
        print(f"{part.name}: at most {limit:.0f} s, see {output / part.name}.log", flush=True)
        outcomes.append(run_part(part, limit, output))
    sys.exit(finish(outcomes, output, options.smoke))


def prepare_output(output: Path) -> None:
    """Create or empty the output folder; exit with 2 if it is not from an earlier check."""
    if output.exists() and not (output / RESULTS).exists():
        print(
            f"{output} exists and is not a result of gpu_check; choose another --output",
            file=sys.stderr,
        )
        sys.exit(2)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / RESULTS).touch()


def check_requirements(smoke: bool) -> None:
    """Exit with 2 if packages or the GPU are missing."""
    missing = missing_packages()
    if missing:
        print(install_instructions(missing), file=sys.stderr)
        sys.exit(2)
    import torch

    if not smoke and not torch.cuda.is_available():
        print("gpu_check needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        sys.exit(2)


def make_part(name: str, output: Path, smoke: bool) -> CheckPart:
    """Return the commands and the time share of a part."""
    tool, *arguments = {
        "tests": ["check_tests"],
        "training": ["bench/training"],
        "growth": ["bench/growth", "410m"],
    }.get(name, ["bench/kernels", name])
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {}

    def command(arguments: Sequence[str], file: str, **environment: str) -> Command:
        flags = ["--output", str(output / f"{file}.jsonl"), *(["--smoke"] if smoke else [])]
        return Command(
            [str(ROOT / "tools" / "gpu" / f"{tool}.py"), *arguments, *flags], settings | environment
        )

    if name != "warm-up":
        return CheckPart(name, SHARES[name], [command(arguments, name)])
    tool = "bench/growth"
    commands = [
        command([case], f"{name}-{case}", TRITON_CACHE_DIR=str(output / f"triton-{case}"))
        for case in ("cold", "warm")
    ]
    return CheckPart(name, SHARES[name], commands)


def finish(outcomes: Sequence[PartResult], output: Path, smoke: bool) -> int:
    """Print the tables, write the JSON file and return the exit code."""
    from tools.gpu.bench.goals import BenchmarkResults, goal_rows
    from tools.gpu.check_tables import failures, report

    results = BenchmarkResults(read_records(outcomes, output))
    goals = [] if smoke else goal_rows(results)
    summary: dict[str, Any] = {
        "smoke": smoke,
        "machine": environment_info(),
        "parts": [vars(outcome) for outcome in outcomes],
        "goals": [dict(zip(GOAL_COLUMNS, row, strict=True)) for row in goals],
        "records": results.records,
    }
    (output / RESULTS).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(*summary["machine"].values(), sep=", ")
    print("\n".join(report(outcomes, results, smoke)))
    success = all(outcome.good for outcome in outcomes) and not failures(results)
    return 0 if success else 1


def read_records(outcomes: Sequence[PartResult], output: Path) -> list[dict[str, Any]]:
    """Return the records of all parts, each with the name of its part.

    An incomplete last line, from a part that was cut, is skipped.
    """
    records = []
    for outcome in outcomes:
        for path in sorted(output.glob(f"{outcome.name}*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    records.append({"part": outcome.name} | json.loads(line))
    return records


def environment_info() -> dict[str, str]:
    """Return the device name and the library versions."""
    import torch
    import triton

    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "no GPU",
        "torch": f"torch {torch.__version__}",
        "cuda": f"CUDA {torch.version.cuda}",
        "triton": f"triton {triton.__version__}",
    }


if __name__ == "__main__":
    main()
