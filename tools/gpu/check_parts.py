"""Parts of the GPU check: their processes, dependencies and time limits.

Every part runs in separate processes, so a kernel that crashes its process or hangs the GPU only
affects its part.
"""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

IMPORT_NAMES = {
    "pyyaml": "yaml",
    "pytest-timeout": "pytest_timeout",
    "py-cpuinfo": "cpuinfo",
    "pydantic-core": "pydantic_core",
    "annotated-doc": "annotated_doc",
    "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection",
    "markdown-it-py": "markdown_it",
}
"""Import names of distributions whose module has a different name."""
UNUSED = ("datasets", "pyarrow", "matplotlib", "tensorboard", "tokenizers")
"""Dependencies of megagrow that no part of the check imports."""
TRANSITIVE = (
    *("einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "tqdm"),
    *("annotated-types", "pydantic-core", "typing-inspection"),
    *("annotated-doc", "shellingham", "markdown-it-py", "mdurl", "pygments"),
)
"""Dependencies of deepspeed, pydantic, typer and rich, which `pip wheel --no-deps` leaves out."""
OFFLINE_INSTALL = """
With network access, for the same Python version and platform:
    DS_BUILD_OPS=0 pip wheel --no-deps --wheel-dir wheels {names}
(pydantic-core in the version that pydantic requires). Then copy wheels/ to this machine:
    pip install --no-deps --no-index --find-links wheels {names}
"""


@dataclass(frozen=True)
class Command:
    """Arguments and environment of one Python process."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the environment of this process."""


@dataclass(frozen=True)
class CheckPart:
    """One part of the check: one or more concurrent processes."""

    name: str
    seconds: float
    """Time share in seconds; time left over by earlier parts is added."""
    commands: Sequence[Command]


@dataclass(frozen=True)
class PartResult:
    """Result and duration of a part."""

    name: str
    seconds: float
    result: str
    """`done`, `failed (exit code N)`, `cut after N s`, or `not started`."""

    @property
    def good(self) -> bool:
        return self.result == "done"


class TimeBudget:
    """Time budget: each part has a deadline, the sum of all shares up to its own.

    `limit` is the latest deadline in seconds.
    """

    def __init__(
        self,
        parts: Iterable[CheckPart],
        limit: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ends: dict[str, float] = {}
        end = 0.0
        for part in parts:
            end += part.seconds
            self._ends[part.name] = min(end, limit)
        self._clock, self._begin = clock, clock()

    @property
    def total(self) -> float:
        """Total seconds of all parts."""
        return max(self._ends.values(), default=0.0)

    def left(self, name: str) -> float:
        """Return the remaining seconds of a part; 0 after its deadline."""
        return max(0.0, self._ends[name] - (self._clock() - self._begin))


def run_part(part: CheckPart, limit: float, output: Path) -> PartResult:
    """Run the commands of a part and kill those still running after `limit` seconds.

    Their output goes to OUTPUT/NAME.log. They have the import path of this process.
    """
    begin = time.monotonic()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    result = "done"
    with (output / f"{part.name}.log").open("wb") as log:
        processes = [
            subprocess.Popen(
                _argv(command, path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
            for command in part.commands
        ]
        try:
            for process in processes:
                process.wait(max(0.0, begin + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            result = f"cut after {limit:.0f} s"
        finally:
            _kill(processes)
    codes = {process.returncode for process in processes} - {0}
    if result == "done" and codes:
        result = f"failed (exit code {', '.join(map(str, sorted(codes)))})"
    return PartResult(part.name, time.monotonic() - begin, result)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON Lines file without its incomplete last line, if any."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def missing_packages(has_module: Callable[[str], bool] | None = None) -> list[str]:
    """Return the required distributions that are not installed.

    `has_module` returns True if a module can be imported.
    """
    is_installed = has_module or (lambda module: importlib.util.find_spec(module) is not None)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dependencies = [re.split(r"[^A-Za-z0-9_-]", text)[0] for text in project["dependencies"]]
    required = [
        name
        for name in [*dependencies, *TRANSITIVE, "pytest", "pytest-timeout"]
        if name not in UNUSED
    ]
    return [name for name in required if not is_installed(IMPORT_NAMES.get(name, name))]


def install_instructions(names: Sequence[str]) -> str:
    """Return the error message for missing distributions, with install instructions."""
    needed = " ".join(names)
    return f"gpu_check needs missing packages: {needed}\n{OFFLINE_INSTALL.format(names=needed)}"


def _argv(command: Command, path: str) -> list[str]:
    variables = {"PYTHONPATH": path} | command.environment
    settings = [f"{name}={value}" for name, value in variables.items()]
    return ["env", *settings, sys.executable, *command.arguments]


def _kill(processes: Iterable[subprocess.Popen]) -> None:
    """Kill processes that are still running, with all their children, and reap them."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
