"""List, describe and verify checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.discovery import list_checkpoints, unfinished
from megagrow.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
)
from megagrow.common.checksums import problems_of_files
from megagrow.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Glance:
    """Summary of a checkpoint; file sizes are checked, contents are not read."""

    path: Path
    manifest: Manifest | None
    """Manifest, or None if it cannot be read."""
    problem: str | None
    """Problem of the checkpoint, or None."""

    @property
    def size(self) -> int:
        """Bytes of its tensors according to the manifest; 0 without one."""
        files = self.manifest.files if self.manifest is not None else {}
        return sum(record.size for record in files.values())


def folder_of(path: Path) -> Path:
    """Return the checkpoint folder of a run directory, or the folder itself.

    Raises CheckpointError if there are no checkpoints.
    """
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder) or unfinished(folder):
            return folder
    raise CheckpointError(f"{path}: neither a run directory with checkpoints nor a folder of them")


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoint at a path, or all checkpoints of a run, oldest first."""
    if (path / MANIFEST_FILE).exists() or not path.is_dir():
        return [path]
    return list_checkpoints(folder_of(path))


def glance(path: Path) -> Glance:
    """Summarize a checkpoint without reading its tensors."""
    manifest = None
    try:
        manifest = parse_manifest(path)
        return Glance(path, read_manifest(path), None)
    except InputError as error:
        return Glance(path, manifest, str(error))


def problems_of(path: Path, share: slice = slice(None)) -> list[str]:
    """Read every byte of a checkpoint and return all problems.

    `share` selects files, in the order of the manifest.
    """
    try:
        manifest = parse_manifest(path)
    except InputError as error:
        return [str(error)]
    files = list(manifest.files.items())[share]
    return problems_of_files(path, files)


def layout_text(manifest: Manifest) -> str:
    """Return the layout as text, such as `ZeRO 1, dp 8, tp 2`."""
    zero_stage, dp, tp = (manifest.layout[key] for key in ("zero_stage", "dp", "tp"))
    return f"ZeRO {zero_stage}, dp {dp}, tp {tp}"


def summary(path: Path) -> dict[str, Any]:
    """Describe a checkpoint by topic, each a text or a mapping. Raises CheckpointError if
    damaged."""
    manifest = parse_manifest(path)
    run = manifest.run
    return {
        "checkpoint": str(path),
        "protected": manifest.protected or "no",
        "model": manifest.model,
        "layout": layout_text(manifest),
        "groups": {
            f"group {number}": f"{len(names)} parameters, {names[0]} ... {names[-1]}"
            for number, names in enumerate(manifest.layout["groups"])
            if names
        },
        "place": {key: run[key] for key in ("stage", "stage_tokens", "stage_step") if key in run},
        "counters": run.get("counters", {}) | {"adam_step": manifest.adam_step},
        "growths": _growths(run) or "none",
        "versions": manifest.environment.get("packages", {}),
        "files": {name: f"{r.size} bytes, {r.checksum}" for name, r in manifest.files.items()},
    }


def _growths(run: dict[str, Any]) -> dict[str, str]:
    """Return each growth of a run: its operators and the source layer of each new layer."""
    layers = run.get("provenance", [])
    operators = [*run.get("operators", []), *([] for _ in layers)]
    return {
        f"growth {number}": f"{' with '.join(names) or 'not known'}, layers from {list(origins)}"
        for number, (origins, names) in enumerate(zip(layers, operators, strict=False), 1)
    }
