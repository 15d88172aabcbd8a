"""The parts of a check: what each needs, how long it may take, and what is done when it overruns.

Every part is a few processes of its own, so that a kernel that kills its process, or hangs the
card, costs no more than its part.
"""

import importlib.util
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
"""Distributions whose module has another name."""
UNUSED = ("datasets", "pyarrow", "matplotlib", "tensorboard", "tokenizers")
"""Dependencies of megagrow that no part of a check imports."""
BEHIND = (
    *("einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "tqdm"),
    *("annotated-types", "pydantic-core", "typing-inspection"),
    *("annotated-doc", "shellingham", "markdown-it-py", "mdurl", "pygments"),
)
"""What deepspeed, pydantic, typer and rich import: wheels carried by --no-deps lack it."""
CARRY = """
Where there is a network, for the same Python and processor:
    DS_BUILD_OPS=0 pip wheel --no-deps --wheel-dir wheels {names}
(pydantic-core in the version that pydantic asks for); and here, with wheels/ carried over:
    pip install --no-deps --no-index --find-links wheels {names}
"""


@dataclass(frozen=True)
class Command:
    """A process of Python."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of this process."""


@dataclass(frozen=True)
class Part:
    """Something that is checked, by one or more processes side by side."""

    name: str
    seconds: float
    """Its share of the time; what earlier parts leave comes on top."""
    commands: Sequence[Command]


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    seconds: float
    result: str
    """`done`, `failed (exit code N)`, or `cut after N s`."""

    @property
    def good(self) -> bool:
        return self.result == "done"


class Budget:
    """Who may run until when: every part has a latest end, that of all shares up to its own."""

    def __init__(self, parts: Iterable[Part], clock: Callable[[], float] = time.monotonic) -> None:
        self._ends: dict[str, float] = {}
        end = 0.0
        for part in parts:
            end += part.seconds
            self._ends[part.name] = end
        self._clock, self._begin = clock, clock()

    @property
    def total(self) -> float:
        """Seconds of all parts together."""
        return max(self._ends.values(), default=0.0)

    def left(self, name: str) -> float:
        """Seconds that a part may still take; 0 if it is over."""
        return max(0.0, self._ends[name] - (self._clock() - self._begin))


def run_part(part: Part, limit: float, output: Path) -> Outcome:
    """Runs the commands of a part; ends what is left of them when `limit` seconds are over.

    What they print goes to OUTPUT/NAME.log. They import what this process can import.
    """
    begin = time.monotonic()
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    result = "done"
    with (output / f"{part.name}.log").open("wb") as log:
        running = [
            subprocess.Popen(
                _words(command, path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
            for command in part.commands
        ]
        try:
            for process in running:
                process.wait(max(0.0, begin + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            result = f"cut after {limit:.0f} s"
        finally:
            _end(running)
    codes = {process.returncode for process in running} - {0}
    if result == "done" and codes:
        result = f"failed (exit code {', '.join(map(str, sorted(codes)))})"
    return Outcome(part.name, time.monotonic() - begin, result)


def missing_packages(has: Callable[[str], bool] | None = None) -> list[str]:
    """The distributions that a check needs and this machine lacks; `has` tells of a module."""
    here = has or (lambda module: importlib.util.find_spec(module) is not None)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [re.split(r"[^A-Za-z0-9_-]", text)[0] for text in project["dependencies"]]
    wanted = [name for name in [*listed, *BEHIND, "pytest", "pytest-timeout"] if name not in UNUSED]
    return [name for name in wanted if not here(IMPORT_NAMES.get(name, name))]


def how_to_carry(names: Sequence[str]) -> str:
    """What to tell somebody on whose machine these are missing."""
    needed = " ".join(names)
    return f"gpu_check needs what is not here: {needed}\n{CARRY.format(names=needed)}"


def _words(command: Command, path: str) -> list[str]:
    variables = {"PYTHONPATH": path} | command.environment
    settings = [f"{name}={value}" for name, value in variables.items()]
    return ["env", *settings, sys.executable, *command.arguments]


def _end(processes: Iterable[subprocess.Popen]) -> None:
    """Ends processes with all that they started, whether they wait or not."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
