"""Check megagrow on a machine with a GPU, in less than twelve minutes.

    python tools/gpu/gpu_check.py [--output gpu_check] [--parts rows attention ...]
                                  [--seconds 540] [--smoke]

The parts, in order: all tests marked `gpu`; every kernel against hardware ceilings and other
libraries (`rows`, `attention`, `loss`); training steps of the 410M, 1.1B and 3B models; a growth of
the paper's 410M recipe; and the stall of a growth with and without kernel warm-up. Each part has a
time share, is cut at the end of it, and keeps the results measured until then. Short tables are
printed last.

OUTPUT/gpu_check.json is written after each part, with all records. The same command again runs the
parts that are not done; of the tests, those that did not pass. --seconds limits one run.

Exit code 0 if all parts finish without an error in megagrow (a missed goal is not an error), 1
otherwise, 2 if a requirement is missing. --smoke makes every call once on the CPU, in Triton's
interpreter: its numbers are meaningless, but it verifies that the check itself works.
"""

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from tools.gpu.check_state import CheckState

SHARES = {
    "tests": 240,
    "rows": 60,
    "attention": 90,
    "loss": 45,
    "scan": 20,
    "training": 110,
    "growth": 55,
    "warm-up": 80,
}
"""Time share of each part in seconds. Their sum is less than twelve minutes."""


def main() -> None:
    """Run the parts, print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit of this run")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="run tiny shapes on the CPU; the numbers are meaningless",
    )
    options = parser.parse_args()
    check_requirements(options.smoke)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the parts too
    from tools.gpu.check_state import CheckState  # imports torch

    output = options.output.resolve()
    state = CheckState(output, options.smoke)
    parts = [make_part(name, output, options.smoke) for name in options.parts]
    sys.exit(run_parts(parts, state, options.seconds))


def run_parts(parts: Sequence[CheckPart], state: "CheckState", seconds: float) -> int:
    """Run the parts that are not done, within a time limit; return the exit code."""
    done = {name for name, outcome in state.outcomes.items() if outcome.good}
    left = [part for part in parts if part.name not in done]
    for part in parts:
        if part.name in done:
            print(f"{part.name}: done by an earlier run")
    budget = TimeBudget(left, seconds)
    for part in left:
        limit = budget.left(part.name)
        if limit <= 0:
            state.add(PartResult(part.name, 0.0, "not started"))
            continue
        log = state.output / f"{part.name}.log"
        print(f"{part.name}: at most {limit:.0f} s, see {log}", flush=True)
        state.add(run_part(part, limit, state.output))
    return state.finish([part.name for part in parts])


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


if __name__ == "__main__":
    main()
