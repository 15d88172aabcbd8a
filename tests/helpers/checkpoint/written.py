"""Checkpoints and Hugging Face folders of known numbers, written without a process group."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

from megagrow.checkpoint.discovery import shard_name
from megagrow.checkpoint.manifest import Manifest, describe_layout, read_manifest, write_manifest
from megagrow.common.checksums import FileRecord
from megagrow.config.schema import ModelConfig
from megagrow.reshard.layout import Layout
from tests.helpers.reshard.definition import State, storage_of

RUN = {
    "stage": 0,
    "stage_tokens": 320,
    "provenance": [],
    "counters": {"step": 5, "tokens": 640, "flops": 2.5, "flops_true": 3.5},
}


def write_checkpoint(path: Path, model: ModelConfig, layout: Layout, state: State) -> Path:
    """A checkpoint as `save_checkpoint` makes it."""
    path.mkdir(parents=True)
    files = {}
    for rank in range(layout.world_size):
        tensors = {
            f"{name}.{kind}": values
            for name, kinds in storage_of(layout, state, rank).items()
            if layout.writes(name, rank)
            for kind, values in kinds.items()
        }
        if tensors:
            save_file(tensors, path / shard_name(rank))
            files[shard_name(rank)] = record_of(path / shard_name(rank))
    environment = {"config": {"seed": 7}, "git_commit": "abc"}
    layout_values = describe_layout(layout)
    manifest = Manifest(model.model_dump(), layout_values, 11, RUN, environment, files)
    write_manifest(path, manifest)
    return path


def set_environment(path: Path, environment: dict[str, Any]) -> None:
    """Replace the environment in a checkpoint's manifest."""
    write_manifest(path, replace(read_manifest(path), environment=environment))


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file, the plain way."""
    content = path.read_bytes()
    return FileRecord(len(content), xxhash.xxh3_64_hexdigest(content))


def shards(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, by file."""
    names = read_manifest(path).files
    return {name: load_file(path / name) for name in names}


def expected_shards(layout: Layout, state: State) -> dict[str, dict[str, torch.Tensor]]:
    """The same of a state, by definition."""
    found = {}
    for rank in range(layout.world_size):
        stored = storage_of(layout, state, rank)
        tensors = {
            f"{name}.{kind}": values
            for name, kinds in stored.items()
            if layout.writes(name, rank)
            for kind, values in kinds.items()
        }
        if tensors:
            found[shard_name(rank)] = tensors
    return found


def differences(one: dict, other: dict, tolerance: float = 0.0) -> list[str]:
    """Tensors that differ between two checkpoints' shards; bit by bit without a tolerance."""
    wrong = [f"only one has {name}" for name in one.keys() ^ other.keys()]
    for file in one.keys() & other.keys():
        wrong += [f"{file}: {name}" for name in one[file].keys() ^ other[file].keys()]
        for name in one[file].keys() & other[file].keys():
            a, b = one[file][name], other[file][name].float()
            same = a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
            wrong += [] if same else [f"{file}: {name}"]
    return wrong


def write_config(folder: Path, **changes: Any) -> None:
    """Changes keys of a folder's config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
