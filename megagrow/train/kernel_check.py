"""Self-check of Triton kernels on this GPU: correct results, cached on disk.

`megagrow_kernels.self_check` runs in a subprocess, so that a kernel that crashes, hangs or makes
the GPU unusable only fails its check. A result is valid for the GPU, the driver, the versions of
torch and Triton, the source of the kernels, and the shapes of the call.
"""

import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megagrow.common.atomic_files import write_text
from megagrow.common.json_text import parse_json, read_limited
from megagrow.common.log_setup import warn_once
from megagrow.errors import DataError
from megagrow.parallel.launch import cache_folder
from megagrow.train.kernel_calls import Checks, KernelCall
from megagrow.train.reporting.run_files import package_version

logger = logging.getLogger(__name__)

SECONDS = 240.0
"""Time limit of all checks, which include the compilation of the kernels."""

COMMAND = (sys.executable, "-m", "megagrow_kernels.self_check")

DEVICE_LOST = 3
"""Exit code of the subprocess if the GPU failed in the last reported call."""

RESULT_BYTES = 100_000

_DRIVER = Path("/proc/driver/nvidia/version")


def check_calls(calls: Sequence[KernelCall], device: torch.device, capability: int) -> Checks:
    """Check calls on a GPU of a compute capability, such as 90.

    Results of earlier checks are read from the cache. Failures without a result, such as a crash or
    a GPU without free memory, are not cached.
    """
    begin, facts = time.perf_counter(), environment(device)
    paths = {call: _cache_path(call, facts) for call in calls}
    results = {call: result for call in calls if (result := _read(paths[call])) is not None}
    missing = [call for call in calls if call not in results]
    for call, result in _run(missing, device, capability):
        results[call] = result
        if "problem" not in result:
            _write(paths[call], {"environment": facts, "call": call.as_json(), "result": result})
    reasons = {call: _reason(call, results[call]) for call in calls}
    passed = sum(reason is None for reason in reasons.values())
    logger.info(
        "kernel self-check | %d of %d calls passed | %d cached | %.1f s",
        passed,
        len(calls),
        len(calls) - len(missing),
        time.perf_counter() - begin,
    )
    return reasons


def environment(device: torch.device) -> dict[str, str]:
    """Return everything except the call that a result depends on."""
    properties = torch.cuda.get_device_properties(device)
    driver = _DRIVER.read_text(encoding="utf-8").splitlines()[0] if _DRIVER.exists() else "unknown"
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": str(package_version("triton")),
        "kernels": source_digest(),
    }


def source_digest() -> str:
    """Return a digest of the source and the tile tables of the kernels."""
    spec = find_spec("megagrow_kernels")
    if spec is None or spec.submodule_search_locations is None:
        return "missing"
    digest = hashlib.blake2b(digest_size=16)
    for root in map(Path, spec.submodule_search_locations):
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.json"))):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


def _cache_path(call: KernelCall, facts: dict[str, str]) -> Path:
    text = json.dumps([facts, call.as_json()], sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return cache_folder() / "kernel-checks" / f"{name}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """Return a cached result; None if there is none, or if it cannot be read."""
    try:
        result = parse_json(read_limited(path, RESULT_BYTES, DataError))["result"]
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return None
    return result if _is_result(result) else None


def _is_result(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"tensor", "error", "tolerance"}:
        return False
    numbers = (value["tolerance"], 0.0 if value["error"] is None else value["error"])
    return isinstance(value["tensor"], str) and all(isinstance(x, int | float) for x in numbers)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1))
    except OSError as error:
        warn_once(logger, "kernel-checks", f"results of kernel checks are not cached: {error}")


def _reason(call: KernelCall, result: dict[str, Any]) -> str | None:
    if "problem" in result:
        return f"the self-check of {call} could not finish: {result['problem']}"
    error, tolerance = result["error"], result["tolerance"]
    found = math.inf if error is None else error
    if found <= tolerance:
        return None
    amount = "is not finite" if error is None else f"differs from the reference by {found:.2g}"
    return (
        f"the self-check of {call} failed: {result['tensor']} {amount} "
        f"(relative error; tolerance {tolerance:.2g})"
    )


def _run(
    calls: Sequence[KernelCall], device: torch.device, capability: int
) -> Iterator[tuple[KernelCall, dict[str, Any]]]:
    """Yield the result of each call. A process that ends during a call is replaced by another."""
    remaining, deadline = list(calls), time.monotonic() + SECONDS
    while remaining:
        lines, code, last = _run_process(remaining, device, capability, deadline)
        started, results = bool(lines), lines[1:]
        yield from zip(remaining, results, strict=False)
        del remaining[: len(results)]
        if code == DEVICE_LOST or not remaining:
            continue
        problem = f"its process ended with exit code {code}" + (f" ({last})" if last else "")
        if code is None:
            problem = f"not finished within {SECONDS:.0f} s"
        # Without a start, or after the time limit, another process would fail as well.
        failed = 1 if started and code is not None else len(remaining)
        yield from ((call, {"problem": problem}) for call in remaining[:failed])
        del remaining[:failed]


def _run_process(
    calls: Sequence[KernelCall], device: torch.device, capability: int, deadline: float
) -> tuple[list[dict[str, Any]], int | None, str]:
    """Run one process; return its lines, its exit code (None: time limit), its last message."""
    command = [*COMMAND, str(device), str(capability)]
    text = json.dumps([call.as_json() for call in calls])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            return [], -1, str(error)
        try:
            process.communicate(text, max(0.0, deadline - time.monotonic()))
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # also the compilers that it has forked
                process.wait()
        out.seek(0)
        errors.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
        messages = errors.read().strip().splitlines()
    return lines, code, messages[-1] if messages else ""
