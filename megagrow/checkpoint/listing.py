"""Checkpoints as people ask about them: which there are, what each is, and whether it is whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.files import list_checkpoints, unfinished
from megagrow.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
)
from megagrow.common.checksums import problem_of
from megagrow.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Glance:
    """A checkpoint at first sight; its files' sizes were compared, but they were not read."""

    path: Path
    manifest: Manifest | None
    """None if it cannot be read."""
    problem: str | None
    """What is wrong with the checkpoint, if anything is."""

    @property
    def size(self) -> int:
        """Bytes of its tensors, as its manifest says; 0 without one."""
        files = self.manifest.files if self.manifest is not None else {}
        return sum(record.size for record in files.values())


def folder_of(path: Path) -> Path:
    """Where the checkpoints of a run are; a run may be given by that folder too. InputError if
    there are none."""
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder) or unfinished(folder):
            return folder
    raise CheckpointError(f"{path}: neither a run directory with checkpoints nor a folder of them")


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint that a path is, or all those of the run that it is, oldest first."""
    if (path / MANIFEST_FILE).exists() or not path.is_dir():
        return [path]
    return list_checkpoints(folder_of(path))


def glance(path: Path) -> Glance:
    """Looks at a checkpoint without reading its tensors."""
    manifest = None
    try:
        manifest = parse_manifest(path)
        return Glance(path, read_manifest(path), None)
    except InputError as error:
        return Glance(path, manifest, str(error))


def problems_of(path: Path) -> list[str]:
    """Reads every byte of a checkpoint and says all that is wrong."""
    try:
        manifest = parse_manifest(path)
    except InputError as error:
        return [str(error)]
    found = (problem_of(path / name, record) for name, record in manifest.files.items())
    return [problem for problem in found if problem is not None]


def layout_text(manifest: Manifest) -> str:
    """`ZeRO 1, dp 8, tp 2`."""
    zero_stage, dp, tp = (manifest.layout[key] for key in ("zero_stage", "dp", "tp"))
    return f"ZeRO {zero_stage}, dp {dp}, tp {tp}"


def summary(path: Path) -> dict[str, Any]:
    """What a checkpoint is, by topics, each a text or a mapping. InputError if it is damaged."""
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
        "place": {"stage": run.get("stage"), "stage_step": run.get("stage_step")},
        "counters": run.get("counters", {}) | {"adam_step": manifest.adam_step},
        "growths": _growths(run) or "none",
        "versions": manifest.environment.get("packages", {}),
        "files": {name: f"{r.size} bytes, {r.checksum}" for name, r in manifest.files.items()},
    }


def _growths(run: dict[str, Any]) -> dict[str, str]:
    """Each growth of a run's history: its operators, and where the new layers came from."""
    layers = run.get("provenance", [])
    operators = [*run.get("operators", []), *([] for _ in layers)]
    return {
        f"growth {number}": f"{' with '.join(names) or 'not known'}, layers from {list(origins)}"
        for number, (origins, names) in enumerate(zip(layers, operators, strict=False), 1)
    }
