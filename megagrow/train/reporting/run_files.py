"""Files in a run's directory that describe the run: config.yaml and environment.json."""

import itertools
import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megagrow.common.atomic_files import first_free, write_text
from megagrow.config.load import to_yaml
from megagrow.config.schema import RunConfig

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"

PACKAGES = ("megagrow", "torch", "deepspeed", "triton", "numpy", "safetensors", "sentencepiece")


def write_run_files(run: RunConfig, environment: dict[str, Any]) -> None:
    """Write config.yaml and environment.json atomically. Raises OSError.

    A config.yaml of another configuration is kept as config-0001.yaml, config-0002.yaml and so on,
    oldest first.
    """
    path, text = run.output_dir / CONFIG_FILE, to_yaml(run)
    if not path.is_file() or path.read_bytes() != text.encode():
        if path.exists():
            earlier = (path.with_name(f"config-{number:04d}.yaml") for number in itertools.count(1))
            path.rename(first_free(earlier))
        write_text(path, text)
    write_text(run.output_dir / ENVIRONMENT_FILE, json.dumps(environment, indent=1))


def describe_environment(run: RunConfig, device: torch.device, ranks: int) -> dict[str, Any]:
    """Return the environment of a start of the run as JSON values; unknown values are None."""
    return {
        "config": run.model_dump(mode="json"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"device": _device_name(device), "ranks": ranks},
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain"),
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU: its model on Linux, else its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine()) or "CPU"


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
