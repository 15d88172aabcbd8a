"""Environment of a run: its config, package versions and the state of the repository."""

import platform
import subprocess
from pathlib import Path
from typing import Any

from megagrow.common.packages import package_version
from megagrow.config.schema import RunConfig

PACKAGES = ("megagrow", "torch", "deepspeed", "triton", "numpy", "safetensors", "sentencepiece")


def describe_environment(run: RunConfig) -> dict[str, Any]:
    """Return the environment as JSON values; unknown values are None."""
    return {
        "config": run.model_dump(mode="json"),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain"),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
