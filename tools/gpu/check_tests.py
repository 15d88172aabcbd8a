"""Run all tests marked `gpu` in parallel processes.

    python tools/gpu/check_tests.py --output tests.jsonl [--smoke]

Started by gpu_check.py. These tests mostly wait for the start of their own processes, so they are
distributed over 6 processes. Writes one record: the number of passed, failed and skipped tests, and
the names of the failed ones.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 6
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def main() -> None:
    """Run the tests; exit with 1 if one failed or none was collected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="only collect the tests")
    options = parser.parse_args()
    names = collect_tests(files_with_gpu_tests(ROOT / "tests"))
    print(f"{len(names)} tests marked gpu")
    record = {"passed": 0, "failed": [], "skipped": 0}
    if not options.smoke:
        record = run_tests(names)
    options.output.write_text(json.dumps({"kind": "tests"} | record) + "\n", encoding="utf-8")
    sys.exit(1 if record["failed"] or not names else 0)


def files_with_gpu_tests(folder: Path) -> list[Path]:
    """Return the test files that contain the mark; only these are imported."""
    mark = "pytest.mark." + "gpu"
    return [p for p in sorted(folder.rglob("test_*.py")) if mark in p.read_text(encoding="utf-8")]


def collect_tests(files: Iterable[Path]) -> list[str]:
    """Return the node ids of the tests."""
    paths = [str(path.relative_to(ROOT)) for path in files]
    command = [*PYTEST, "--collect-only", "-m", "gpu", *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in result.stdout.splitlines() if "::" in line]
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)
    return names


def run_tests(names: list[str]) -> dict[str, Any]:
    """Run the tests, distributed round-robin over the processes, and return their counts."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"{number}.xml") for number in range(PROCESSES)]
        processes = [
            subprocess.Popen([*PYTEST, f"--junitxml={report}", *names[number::PROCESSES]], cwd=ROOT)
            for number, report in enumerate(reports)
            if names[number::PROCESSES]
        ]
        for process in processes:
            process.wait()
        return count_results(report for report in reports if report.exists())


def count_results(reports: Iterable[Path]) -> dict[str, Any]:
    """Return the summed counts of pytest's JUnit reports."""
    passed, failed, skipped = 0, [], 0
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"{case.get('classname')}::{case.get('name')}")
            elif case.find("skipped") is not None:
                skipped += 1
            else:
                passed += 1
    return {"passed": passed, "failed": sorted(failed), "skipped": skipped}


if __name__ == "__main__":
    main()
