"""Manifest of a checkpoint (manifest.json): its contents and files.

A folder is a checkpoint only if the manifest is valid and every file it lists has the recorded
size. The manifest is written last. Its own checksum detects damage, and all values are validated
before use, because a manifest is untrusted input.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagrow.common.atomic_files import write_synced
from megagrow.common.checksums import (
    FileRecord,
    Files,
    check_size,
    problems_of_files,
    text_checksum,
)
from megagrow.common.json_text import FILE_BYTES, parse_json, read_limited
from megagrow.common.untrusted_values import as_tally, problems_of_values
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError, InputError
from megagrow.parallel.optimizers.rules import ADAMW, MuonRule
from megagrow.parallel.pipeline.split import PipelineSplit
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Layout

MANIFEST_FILE = "manifest.json"
FORMAT = 2
BEFORE_GROWTH = "before growth"
"""Reason of protection: the checkpoint ends a stage that is followed by a growth."""

MOST_RANKS = 2**17
"""Maximum ranks along each axis of a layout."""

MOST_ELEMENTS = 2**60
"""Maximum number of elements of a parameter."""

_NOT_READ = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Exceptions raised while parsing a damaged file."""

SHARD_NAME = re.compile(r"rank-\d{5,}\.safetensors", re.ASCII)
"""File name of a rank."""


class OtherFormat(CheckpointError):
    """Checkpoint of another version of the format."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint other than tensors; all fields but `files` are plain JSON values."""

    model: dict[str, Any]
    layout: dict[str, Any]
    """Keys zero_stage, dp (data x context parallel), tp, groups: the optimizer's groups of
    parameter names, `optimizer`, absent for AdamW, and `pipeline`, absent without pipeline
    parallelism: the fields of `PipelineSplit`."""
    adam_step: int
    run: dict[str, Any]
    """Position of the run and provenance of its layers; see `train/train_state.py`."""
    environment: dict[str, Any]
    """Resolved config, hardware, package versions, and repository state."""
    files: Files
    protected: str | None = None
    """Reason why the checkpoint is never pruned, or None."""
    scheduled: bool = True
    """False if only a stop of the run caused the save; a rewind prefers other checkpoints."""
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def read_layout(self) -> Layout:
        """Return the layout of the files."""
        model = ModelConfig(**self.model)
        groups = tuple(tuple(group) for group in self.layout["groups"])
        zero_stage, dp, tp = (self.layout[key] for key in ("zero_stage", "dp", "tp"))
        rule = {"adamw": ADAMW, "muon": MuonRule()}[self.layout.get("optimizer", "adamw")]
        values = self.layout.get("pipeline")
        split = values and PipelineSplit(values["ranks"], tuple(values["chunks"]))
        return Layout(parameter_plan(model, tp, rule), groups, zero_stage, dp, tp, split)


def describe_layout(layout: Layout) -> dict[str, Any]:
    """Return the layout in the manifest's format."""
    names = ("zero_stage", "dp", "tp", "groups")
    described = {name: getattr(layout, name) for name in names}
    if layout.pipeline is not None:
        described["pipeline"] = asdict(layout.pipeline)
    # Versions before Muon wrote no optimizer, and refuse other states as damaged.
    return described | ({} if layout.matrices == ADAMW else {"optimizer": layout.matrices.name})


def manifest_document(manifest: Manifest) -> dict[str, Any]:
    """Return the content of manifest.json: all fields, and `checksum` over the others."""
    files = {name: record.to_json() for name, record in manifest.files.items()}
    values = json.loads(json.dumps(asdict(replace(manifest, files={})) | {"files": files}))
    return values | {"checksum": _checksum(values)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json into an unpublished checkpoint and sync it."""
    write_synced(directory / MANIFEST_FILE, json.dumps(manifest_document(manifest), indent=1))


def parse_manifest(directory: Path) -> Manifest:
    """Read a manifest without checking its files.

    Raises CheckpointError if it is damaged or lists a file that is not a rank's file in its folder.
    """
    path = directory / MANIFEST_FILE
    try:
        if not path.is_file():
            raise CheckpointError(f"{directory}: not a checkpoint, it has no {MANIFEST_FILE}")
        values = parse_json(read_limited(path, FILE_BYTES, CheckpointError))
        if values.get("format", FORMAT) != FORMAT:
            raise OtherFormat(
                f"{path}: written in format {values['format']}, this version reads {FORMAT}"
            )
        if values.pop("checksum") != _checksum(values):
            raise ValueError("checksum mismatch")
        files = {name: FileRecord.from_json(record) for name, record in values["files"].items()}
        manifest = Manifest(**values | {"files": files})
        _check_kinds(manifest)
        _check_layout(manifest)
    except _NOT_READ as error:
        problem = problems_of_values(error) if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{path}: damaged ({problem}); use another checkpoint") from error
    for name in files:
        if not SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path}: names {name!r}, which is not a rank's file; use another checkpoint"
            )
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest and check that its files exist with the recorded sizes.

    Raises CheckpointError for an incomplete checkpoint. File contents are not read.
    """
    manifest = parse_manifest(directory)
    for name, record in manifest.files.items():
        check_size(directory / name, record)
    return manifest


def has_right_sizes(directory: Path) -> bool:
    """Return True if `read_manifest` accepts a checkpoint."""
    try:
        read_manifest(directory)
    except InputError:
        return False
    return True


def verify_checkpoint(directory: Path) -> Manifest:
    """Read a manifest and verify every byte of its files.

    Raises CheckpointError for the first mismatch.
    """
    manifest = parse_manifest(directory)
    problem = next(problems_of_files(directory, manifest.files.items()), None)
    if problem is not None:
        raise CheckpointError(problem)
    return manifest


def _checksum(values: dict[str, Any]) -> str:
    return text_checksum(json.dumps(values, sort_keys=True, separators=(",", ":")))


def _check_kinds(manifest: Manifest) -> None:
    """Raise ValueError if a required part of a field is missing or has the wrong type."""
    run, lists = manifest.run, ("provenance", "operators")
    kinds: list[tuple[object, Any]] = [
        *((value, dict) for value in (manifest.model, manifest.layout, run)),
        *((value, dict) for value in (manifest.environment, run.get("counters", {}))),
        (manifest.environment.get("packages", {}), dict),
        (manifest.protected or "", str),
        (manifest.scheduled, bool),
        *((run.get(name, []), list) for name in lists),
        *((inner, list) for name in lists for inner in run.get(name, [])),
        *((name, str) for names in run.get("operators", []) for name in names),
        *((size, int | float) for size in run.get("counters", {}).values()),
    ]
    as_tally(manifest.adam_step)
    for value, kind in kinds:
        if not isinstance(value, kind):
            raise ValueError(f"{value!r:.60} has the wrong type or position")


def _check_layout(manifest: Manifest) -> None:
    """Raise ValueError if the layout does not fit the model; checksums detect only accidents."""
    zero_stage, *grid = (manifest.layout[key] for key in ("zero_stage", "dp", "tp"))
    sizes = all(type(size) is int and 0 < size <= MOST_RANKS for size in grid)
    if type(zero_stage) is not int or zero_stage not in range(4) or not sizes:
        raise ValueError(f"no layout has ZeRO stage {zero_stage!r:.60} and dp, tp = {grid!r:.60}")
    _check_pipeline(manifest)
    layout = manifest.read_layout()
    if any(spec.rows * spec.cols > MOST_ELEMENTS for spec in layout.plan.values()):
        raise ValueError("a parameter of its model is larger than any disk")
    named = [name for group in layout.groups for name in group]
    if sorted(named) != sorted(layout.plan):
        raise ValueError("the groups of its layout are not the parameters of its model")


def _check_pipeline(manifest: Manifest) -> None:
    """Raise ValueError if the chunks of a pipeline are not those of the model on its ranks."""
    if "pipeline" not in manifest.layout:
        return
    ranks, chunks = (manifest.layout["pipeline"][key] for key in ("ranks", "chunks"))
    layers = ModelConfig(**manifest.model).num_hidden_layers
    sizes = all(type(size) is int and 0 <= size <= layers for size in chunks)
    divided = type(ranks) is int and ranks > 1 and chunks and len(chunks) % ranks == 0
    if not sizes or not divided or sum(chunks) != layers:
        raise ValueError(f"no pipeline of {ranks!r:.60} ranks has chunks of {chunks!r:.60} layers")
