"""A checkpoint's manifest: what the checkpoint is, and which files make it whole.

A checkpoint is a directory `step-N` with one safetensors file per rank and `manifest.json`. It is
written as `step-N.tmp` and renamed at the end, so that a directory with the right name is whole
unless its files were damaged afterwards. The manifest has size and checksum of every file, and its
own checksum.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megagrow.common.atomic_files import write_synced
from megagrow.common.checksums import FileRecord, Files, check_file, check_size, text_checksum
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Layout

MANIFEST_FILE = "manifest.json"
FORMAT = 2
BEFORE_GROWTH = "before growth"
"""Why a checkpoint is protected: its stage ends with it, and the next one begins by a growth."""

MOST_RANKS = 2**17
"""Of a layout, along each of its axes: more than any cluster has."""

MOST_ELEMENTS = 2**60
"""Of a parameter."""

_NOT_READ = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What comes of a damaged file."""

_SHARD = re.compile(r"rank-\d{5,}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint but its tensors; all fields are plain JSON values but `files`."""

    model: dict[str, Any]
    layout: dict[str, Any]
    """zero_stage, dp, tp, and groups: the optimizer's groups of parameter names."""
    adam_step: int
    run: dict[str, Any]
    """Where the run stands, and the provenance of its layers; see `train/state.py`."""
    environment: dict[str, Any]
    """The resolved config, versions of the packages, and the state of the repository."""
    files: Files
    protected: str | None = None
    """Why the run keeps it for ever, if it does."""
    format: int = FORMAT

    def read_layout(self) -> Layout:
        """The layout in which the files are written."""
        model = ModelConfig(**self.model)
        groups = tuple(tuple(group) for group in self.layout["groups"])
        zero_stage, dp, tp = (self.layout[key] for key in ("zero_stage", "dp", "tp"))
        return Layout(parameter_plan(model, tp), groups, zero_stage, dp, tp)


def describe_layout(layout: Layout) -> dict[str, Any]:
    """The layout as the manifest keeps it."""
    names = ("zero_stage", "dp", "tp", "groups")
    return {name: getattr(layout, name) for name in names}


def manifest_document(manifest: Manifest) -> dict[str, Any]:
    """What stands in manifest.json: all fields, and `checksum`, which is that of the others."""
    files = {name: record.to_json() for name, record in manifest.files.items()}
    values = json.loads(json.dumps(asdict(replace(manifest, files={})) | {"files": files}))
    return values | {"checksum": _checksum(values)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json into an unpublished checkpoint and sync it."""
    write_synced(directory / MANIFEST_FILE, json.dumps(manifest_document(manifest), indent=1))


def parse_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint; its files are not looked at. InputError if it is damaged, or
    names a file that is not one of a rank in its own directory."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory}: not a checkpoint, it has no {MANIFEST_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"{path}: written in format {values['format']}, this version reads {FORMAT}"
            )
        if values.pop("checksum") != _checksum(values):
            raise ValueError("its checksum is another one")
        files = {name: FileRecord.from_json(record) for name, record in values["files"].items()}
        manifest = Manifest(**values | {"files": files})
        _check_kinds(manifest)
        _check_layout(manifest)
    except _NOT_READ as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from error
    for name in files:
        if not _SHARD.fullmatch(name):
            raise CheckpointError(f"{path}: names {name!r}, which is no rank's file; do not use it")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files are there in their sizes; what is in them is not
    read. InputError says what is wrong with a checkpoint that is not whole."""
    manifest = parse_manifest(directory)
    for name, record in manifest.files.items():
        check_size(directory / name, record)
    return manifest


def verify_checkpoint(directory: Path) -> Manifest:
    """The manifest of a checkpoint of which every byte was read. InputError for the first one that
    is not as it was written."""
    manifest = parse_manifest(directory)
    for name, record in manifest.files.items():
        check_file(directory / name, record)
    return manifest


def _checksum(values: dict[str, Any]) -> str:
    return text_checksum(json.dumps(values, sort_keys=True, separators=(",", ":")))


def _check_kinds(manifest: Manifest) -> None:
    """ValueError if a field that is shown or read by its parts has no such parts."""
    run, lists = manifest.run, ("provenance", "operators")
    kinds: list[tuple[object, Any]] = [
        *((value, dict) for value in (manifest.model, manifest.layout, run)),
        *((value, dict) for value in (manifest.environment, run.get("counters", {}))),
        (manifest.environment.get("packages", {}), dict),
        (manifest.adam_step, int),
        (manifest.protected or "", str),
        *((run.get(name, []), list) for name in lists),
        *((inner, list) for name in lists for inner in run.get(name, [])),
        *((name, str) for names in run.get("operators", []) for name in names),
        *((size, int | float) for size in run.get("counters", {}).values()),
    ]
    for value, kind in kinds:
        if not isinstance(value, kind):
            raise ValueError(f"{value!r:.60} stands in a wrong place")


def _check_layout(manifest: Manifest) -> None:
    """ValueError if the layout is none of the model; the checksum tells only of accidents."""
    zero_stage, *grid = (manifest.layout[key] for key in ("zero_stage", "dp", "tp"))
    sizes = all(type(size) is int and 0 < size <= MOST_RANKS for size in grid)
    if type(zero_stage) is not int or zero_stage not in range(4) or not sizes:
        raise ValueError(f"no layout has ZeRO stage {zero_stage!r:.60} and dp, tp = {grid!r:.60}")
    layout = manifest.read_layout()
    if any(spec.rows * spec.cols > MOST_ELEMENTS for spec in layout.plan.values()):
        raise ValueError("a parameter of its model is larger than any disk")
    named = [name for group in layout.groups for name in group]
    if sorted(named) != sorted(layout.plan):
        raise ValueError("the groups of its layout are not the parameters of its model")
