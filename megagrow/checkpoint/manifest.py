"""A checkpoint's manifest: what the checkpoint is, and which files make it whole.

A checkpoint is a directory `step-N` with one safetensors file per rank and `manifest.json`. It is
written as `step-N.tmp` and renamed at the end, so that a directory with the right name is whole
unless its files were damaged afterwards.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.files import sync
from megagrow.config.schema import ModelConfig
from megagrow.errors import InputError
from megagrow.parallel.plan import parameter_plan
from megagrow.reshard.layout import Layout

MANIFEST_FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint but its tensors; all fields are plain JSON values."""

    model: dict[str, Any]
    layout: dict[str, Any]
    """zero_stage, dp, tp, and groups: the optimizer's groups of parameter names."""
    adam_step: int
    run: dict[str, Any]
    """Where the run stands, and the provenance of its layers; see `train/state.py`."""
    environment: dict[str, Any]
    """The resolved config, versions of the packages, and the state of the repository."""
    files: dict[str, int]
    """Name to size in bytes."""
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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes manifest.json and waits until it is on the disk."""
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
    sync(path)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. InputError says what is wrong with a checkpoint not whole."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise InputError(f"{directory}: not a checkpoint, it has no {MANIFEST_FILE}")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        manifest.read_layout()
        files = dict(manifest.files)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged ({error}); use another checkpoint") from error
    if manifest.format != FORMAT:
        raise InputError(
            f"{path}: written in format {manifest.format}, this version reads {FORMAT}"
        )
    for name, size in files.items():
        file = directory / name
        if not file.is_file():
            raise InputError(f"{directory}: {name} is missing; use another checkpoint")
        if file.stat().st_size != size:
            found = file.stat().st_size
            raise InputError(f"{file}: truncated or damaged, {found} bytes instead of {size}")
    return manifest
