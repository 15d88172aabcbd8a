"""All tests marked `gpu`, in a few processes side by side.

    python tools/gpu/check_tests.py --output tests.jsonl

Started by gpu_check.py. What such tests wait for is mostly the start of processes of their own, so
they are dealt out. Writes one record: how many passed, failed and were skipped, and which failed.
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
    """Runs the tests; exit code 1 if one failed, or if there are none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="No more than finding the tests.")
    options = parser.parse_args()
    names = collected(files_with_gpu_tests(ROOT / "tests"))
    print(f"{len(names)} tests marked gpu")
    record = {"passed": 0, "failed": [], "skipped": 0}
    if not options.smoke:
        record = ran(names)
    options.output.write_text(json.dumps({"kind": "tests"} | record) + "\n", encoding="utf-8")
    sys.exit(1 if record["failed"] or not names else 0)


def files_with_gpu_tests(folder: Path) -> list[Path]:
    """The test files in which the mark occurs: only they are imported."""
    mark = "pytest.mark." + "gpu"
    return [p for p in sorted(folder.rglob("test_*.py")) if mark in p.read_text(encoding="utf-8")]


def collected(files: Iterable[Path]) -> list[str]:
    """The tests' names, as pytest takes them."""
    paths = [str(path.relative_to(ROOT)) for path in files]
    command = [*PYTEST, "--collect-only", "-m", "gpu", *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in result.stdout.splitlines() if "::" in line]
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)
    return names


def ran(names: list[str]) -> dict[str, Any]:
    """What came of the tests, dealt out to the processes in turn."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"{number}.xml") for number in range(PROCESSES)]
        running = [
            subprocess.Popen([*PYTEST, f"--junitxml={report}", *names[number::PROCESSES]], cwd=ROOT)
            for number, report in enumerate(reports)
            if names[number::PROCESSES]
        ]
        for process in running:
            process.wait()
        return counted(report for report in reports if report.exists())


def counted(reports: Iterable[Path]) -> dict[str, Any]:
    """The sum of pytest's own reports."""
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
