"""Date, hardware and software of a run, from its environment.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megagrow.common.json_text import read_json
from megagrow.train.reporting.run_files import ENVIRONMENT_FILE

PACKAGES = ("megagrow", "torch")
"""Packages whose versions are part of the origin."""


@dataclass(frozen=True, slots=True)
class RunOrigin:
    """Circumstances of the last start of a run; None where they are not recorded."""

    started: datetime | None = None
    """In UTC."""
    device: str | None = None
    """Name of rank 0's GPU or CPU."""
    ranks: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    """Name and version of `PACKAGES`."""

    @property
    def date(self) -> str:
        """Date and time of the last start, `-` if unknown."""
        return "-" if self.started is None else f"{self.started:%Y-%m-%d %H:%M} UTC"

    @property
    def hardware(self) -> str:
        """Device and number of ranks, `-` if unknown."""
        if self.device is None or self.ranks is None:
            return "-"
        return f"{self.device}, {self.ranks} rank{'' if self.ranks == 1 else 's'}"

    @property
    def software(self) -> str:
        """Versions of the packages, `-` if unknown."""
        return ", ".join(f"{name} {version}" for name, version in self.versions) or "-"


def read_origin(directory: Path) -> RunOrigin:
    """Read the origin of the run in `directory`; values that are missing or unusable are None.

    Raises DataError if environment.json is not a JSON object.
    """
    path = directory / ENVIRONMENT_FILE
    if not path.is_file():
        return RunOrigin()
    environment = read_json(path)
    hardware, packages = _mapping(environment.get("hardware")), environment.get("packages")
    device, ranks = hardware.get("device"), hardware.get("ranks")
    versions = _mapping(packages)
    return RunOrigin(
        started=_time(environment.get("started")),
        device=device if isinstance(device, str) else None,
        ranks=ranks if type(ranks) is int else None,
        versions=tuple((name, str(versions[name])) for name in PACKAGES if versions.get(name)),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _time(value: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
