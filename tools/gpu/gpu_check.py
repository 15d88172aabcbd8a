"""Checks megagrow on a machine with a GPU, in less than nine minutes.

    python tools/gpu/gpu_check.py [--output gpu_check] [--parts rows attention ...] [--smoke]

In this order: all tests marked `gpu`; every kernel against what the card can do and against what
others have made (`rows`, `attention`, `loss`); training steps of the 410M, 1.1B and 3B models; a
growth of the paper's 410M recipe; and how long a growth stands still with and without kernels that
were compiled beforehand. Each part has its share of the time, is cut when that is over, and leaves
what it found by then. Short tables are printed last, and everything is in OUTPUT/gpu_check.json.

Exit code 0 if all parts came to their end without an error of megagrow's (goals that are not met
are no error), 1 if not, 2 if the machine lacks something. --smoke makes every call once on the CPU,
in Triton's interpreter: no number means anything then, but nothing will be wrong with the check.
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
    Budget,
    Command,
    Outcome,
    Part,
    how_to_carry,
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
"""Seconds. Together ten less than nine minutes."""


def main() -> None:
    """Runs the parts, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--smoke", action="store_true", help="On the CPU, only to see it run.")
    options = parser.parse_args()
    refuse_without(options.smoke)
    output = options.output.resolve()
    make_room(output)
    parts = [part_of(name, output, options.smoke) for name in options.parts]
    outcomes = []
    budget = Budget(parts)
    for part in parts:
        limit = budget.left(part.name)
        print(f"{part.name}: at most {limit:.0f} s, see {output / part.name}.log", flush=True)
        outcomes.append(run_part(part, limit, output))
    sys.exit(conclude(outcomes, output, options.smoke))


def make_room(output: Path) -> None:
    """An empty folder, where there was none or that of an earlier check; exits with 2 otherwise."""
    if output.exists() and not (output / RESULTS).exists():
        print(f"{output} exists, and is no result of gpu_check", file=sys.stderr)
        sys.exit(2)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / RESULTS).touch()


def refuse_without(smoke: bool) -> None:
    """Exits with 2 and a helpful word where packages or the GPU are missing."""
    missing = missing_packages()
    if missing:
        print(how_to_carry(missing), file=sys.stderr)
        sys.exit(2)
    import torch

    if not smoke and not torch.cuda.is_available():
        print("gpu_check needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        sys.exit(2)


def part_of(name: str, output: Path, smoke: bool) -> Part:
    """What is to be run for a part."""
    tool, *words = {
        "tests": ["check_tests"],
        "training": ["bench/training"],
        "growth": ["bench/growth", "410m"],
    }.get(name, ["bench/kernels", name])
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {}

    def command(words: Sequence[str], file: str, **environment: str) -> Command:
        written = ["--output", str(output / f"{file}.jsonl"), *(["--smoke"] if smoke else [])]
        return Command(
            [str(ROOT / "tools" / "gpu" / f"{tool}.py"), *words, *written], settings | environment
        )

    if name != "warm-up":
        return Part(name, SHARES[name], [command(words, name)])
    tool = "bench/growth"
    commands = [
        command([case], f"{name}-{case}", TRITON_CACHE_DIR=str(output / f"triton-{case}"))
        for case in ("cold", "warm")
    ]
    return Part(name, SHARES[name], commands)


def conclude(outcomes: Sequence[Outcome], output: Path, smoke: bool) -> int:
    """Prints the tables, writes the JSON, and says how it all ended."""
    from tools.gpu.bench.goals import Findings, goal_rows
    from tools.gpu.check_tables import failures, report

    findings = Findings(read_records(outcomes, output))
    goals = [] if smoke else goal_rows(findings)
    told: dict[str, Any] = {
        "smoke": smoke,
        "machine": machine(),
        "parts": [vars(outcome) for outcome in outcomes],
        "goals": [dict(zip(GOAL_COLUMNS, row, strict=True)) for row in goals],
        "records": findings.records,
    }
    (output / RESULTS).write_text(json.dumps(told, indent=1), encoding="utf-8")
    print(*told["machine"].values(), sep=", ")
    print("\n".join(report(outcomes, findings, smoke)))
    good = all(outcome.good for outcome in outcomes) and not failures(findings)
    return 0 if good else 1


def read_records(outcomes: Sequence[Outcome], output: Path) -> list[dict[str, Any]]:
    """What the parts have written, each record with the name of its part. A last line that a part
    was cut in is left out."""
    records = []
    for outcome in outcomes:
        for path in sorted(output.glob(f"{outcome.name}*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    records.append({"part": outcome.name} | json.loads(line))
    return records


def machine() -> dict[str, str]:
    """What it was measured on."""
    import torch
    import triton

    there = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if there else "no GPU",
        "torch": f"torch {torch.__version__}",
        "cuda": f"CUDA {torch.version.cuda}",
        "triton": f"triton {triton.__version__}",
    }


if __name__ == "__main__":
    main()
