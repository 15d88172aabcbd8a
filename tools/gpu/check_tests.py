"""Run all tests marked `gpu` in parallel processes, after compiling their kernels.

    python tools/gpu/check_tests.py --output tests.jsonl [--smoke]

Started by gpu_check.py. The kernels of the tests are first compiled into Triton's cache by one
process per core: compiled one after another in a test, they take minutes. The tests then run in 6
processes, since they mostly wait for the start of their own processes. OUTPUT gets one record per
test as soon as it ends; tests that it lists as passed or skipped are not run again.

This module is also the pytest plugin that writes the records.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tools.gpu.check_parts import read_lines  # noqa: E402

PROCESSES = 6
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
CALLS = (sys.executable, "-m", "tests.helpers.kernels.gpu_checks", "calls")
WARM_UP = (sys.executable, "-m", "megagrow_kernels.warm_up")


def main() -> None:
    """Run the tests; exit with 1 if one failed or none was collected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="only collect the tests")
    options = parser.parse_args()
    names = collect_tests(files_with_gpu_tests(ROOT / "tests"))
    print(f"{len(names)} tests marked gpu", flush=True)
    if not options.smoke:
        append(options.output, compile_kernels())
        run_tests(remaining(names, options.output), options.output)
    failed = [name for name, outcome in outcomes(options.output).items() if outcome == "failed"]
    sys.exit(1 if failed or not names else 0)


def compile_kernels() -> dict[str, Any]:
    """Compile the kernels of the tests in parallel; return a record.

    A kernel that cannot be compiled fails the test that uses it.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    begin = time.monotonic()
    calls = subprocess.run(CALLS, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = [*WARM_UP, str(10 * major + minor), str(len(os.sched_getaffinity(0)))]
    subprocess.run(command, cwd=ROOT, input=calls, text=True, check=False)
    return {"kind": "compile", "calls": len(json.loads(calls)), "seconds": time.monotonic() - begin}


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


def remaining(names: Sequence[str], records: Path) -> list[str]:
    """Return the tests that have no record of success."""
    known = outcomes(records)
    return [name for name in names if known.get(name) not in ("passed", "skipped")]


def outcomes(records: Path) -> dict[str, str]:
    """Return the last outcome of each test, by node id."""
    lines = read_lines(records) if records.exists() else []
    return {line["name"]: line["outcome"] for line in lines if line["kind"] == "test"}


def run_tests(names: Sequence[str], records: Path) -> None:
    """Run the tests, distributed round-robin over the processes, and append their records."""
    command = [*PYTEST, "-p", "tools.gpu.check_tests", "--gpu-records", str(records)]
    shares = [names[number::PROCESSES] for number in range(min(PROCESSES, len(names)))]
    processes = [subprocess.Popen([*command, *share], cwd=ROOT) for share in shares]
    for process, share in zip(processes, shares, strict=True):
        if process.wait() not in (0, 1):  # killed, or an error of pytest itself
            for name in remaining(share, records):
                text = f"its process ended with exit code {process.returncode}"
                append(records, {"kind": "test", "name": name, "outcome": "failed", "text": text})


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one line in a single write, so that processes can share the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --gpu-records."""
    parser.addoption("--gpu-records", type=Path, help="file to which records are appended")


def pytest_configure(config: pytest.Config) -> None:
    """Record the results if --gpu-records is given."""
    path = config.getoption("--gpu-records")
    if path is not None:
        config.pluginmanager.register(TestRecorder(path))


class TestRecorder:
    """Append a record for each test when it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the call, or the set-up or tear-down that failed or skipped the test."""
        if report.when == "call" or report.outcome != "passed":
            record = {"kind": "test", "name": report.nodeid, "outcome": report.outcome}
            append(self._path, record | {"seconds": report.duration})


if __name__ == "__main__":
    main()
