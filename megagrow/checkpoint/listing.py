"""List, describe and verify checkpoints."""

from pathlib import Path
from typing import Any

from megagrow.checkpoint.discovery import list_checkpoints, step_of, unfinished
from megagrow.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
)
from megagrow.common.checksums import problems_of_files
from megagrow.config.stage import format_layout
from megagrow.errors import CheckpointError, InputError


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


def problems_of(path: Path, share: slice = slice(None)) -> list[str]:
    """Read every byte of a checkpoint and return all problems.

    `share` selects files, in the order of the manifest.
    """
    try:
        manifest = parse_manifest(path)
    except InputError as error:
        return [str(error)]
    return list(problems_of_files(path, list(manifest.files.items())[share]))


def list_entries(folder: Path) -> list[dict[str, Any]]:
    """Return an entry for each checkpoint of a folder, oldest first, then each unfinished one.

    File sizes are checked; tensors are not read.
    """
    entries = [_entry(path) for path in list_checkpoints(folder)]
    for path in unfinished(folder):
        step = int(path.name.removeprefix("step-").partition(".")[0])
        entries.append(
            {"path": str(path), "step": step, "state": "unfinished"} | dict.fromkeys(_OF_MANIFEST)
        )
    return entries


_OF_MANIFEST = ("problem", "stage", "tokens", "bytes", "layout", "protected")
"""Keys of an entry that are null without a manifest."""


def _entry(path: Path) -> dict[str, Any]:
    """Return the entry of a checkpoint; values of an unreadable manifest are null."""
    entry = {"path": str(path), "step": step_of(path)} | dict.fromkeys(_OF_MANIFEST)
    entry |= {"state": "valid"}
    try:
        manifest = parse_manifest(path)
        entry |= {
            "stage": manifest.run.get("stage"),
            "tokens": manifest.run.get("counters", {}).get("tokens", 0),
            "bytes": manifest.size,
            "layout": _layout(manifest),
            "protected": manifest.protected,
        }
        read_manifest(path)
    except InputError as error:
        entry |= {"state": "damaged", "problem": str(error)}
    return entry


def _layout(manifest: Manifest) -> dict[str, Any]:
    sizes = {key: manifest.layout[key] for key in ("zero_stage", "dp", "tp")}
    pipeline = manifest.layout.get("pipeline")
    return sizes if pipeline is None else sizes | {"pp": pipeline["ranks"]}


def contents(path: Path) -> dict[str, Any]:
    """Return the values of a checkpoint's manifest. Raises CheckpointError if it is damaged."""
    manifest = parse_manifest(path)
    run = manifest.run
    return {
        "path": str(path),
        "protected": manifest.protected,
        "model": manifest.model,
        "layout": _layout(manifest),
        "groups": manifest.layout["groups"],
        "position": {
            key: run[key] for key in ("stage", "stage_tokens", "stage_step") if key in run
        },
        "counters": run.get("counters", {}),
        "adam_step": manifest.adam_step,
        "growths": _growths(run),
        "versions": manifest.environment.get("packages", {}),
        "files": {name: record.to_json() for name, record in manifest.files.items()},
    }


def summary(path: Path) -> dict[str, Any]:
    """Describe a checkpoint: topic -> text or mapping. Raises CheckpointError if it is damaged."""
    values = contents(path)
    return {
        "checkpoint": values["path"],
        "protected": values["protected"] or "no",
        "model": values["model"],
        "layout": format_layout(**values["layout"]),
        "groups": {
            f"group {number}": f"{len(names)} parameters, {names[0]} ... {names[-1]}"
            for number, names in enumerate(values["groups"])
            if names
        },
        "place": values["position"],
        "counters": values["counters"] | {"adam_step": values["adam_step"]},
        "growths": {
            f"growth {number}": _growth_text(growth)
            for number, growth in enumerate(values["growths"], 1)
        }
        or "none",
        "versions": values["versions"],
        "files": {
            name: f"{record['bytes']} bytes, {record['xxh3_64']}"
            for name, record in values["files"].items()
        },
    }


def _growths(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the growth of each finished stage of a run: its operators and the source layer of each
    new layer; both are empty without growth."""
    layers = run.get("provenance", [])
    operators = [*run.get("operators", []), *([] for _ in layers)]
    return [
        {"operators": list(names), "layers": list(origins)}
        for origins, names in zip(layers, operators, strict=False)
    ]


def _growth_text(growth: dict[str, Any]) -> str:
    if not growth["operators"] and not growth["layers"]:
        return "none is recorded"
    operators = " with ".join(growth["operators"]) or "unknown"
    return f"{operators}, layers from {growth['layers']}"
