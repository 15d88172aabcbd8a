"""Targets of offline growth: tensors and their positions in the output files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megagrow.checkpoint.discovery import shard_name
from megagrow.checkpoint.manifest import MANIFEST_FILE, Manifest, manifest_document
from megagrow.checkpoint.shards import Places, ShardTensor, shard_tensors, units
from megagrow.checkpoint.tensor_file import Planned, Stored, planned
from megagrow.common.atomic_files import sync, write_synced
from megagrow.common.checksums import FileRecord, Files
from megagrow.config.schema import ModelConfig
from megagrow.formats.hugging_face import INDEX_FILE, index_of, planned_files, single_rank_layout
from megagrow.reshard.layout import Layout

Documents = dict[str, dict[str, Any] | str]
"""JSON objects and texts by file name."""


@dataclass(frozen=True)
class TargetPiece:
    """Shard tensor of the target and its position."""

    unit: ShardTensor
    file: str
    stored: Stored


@dataclass(frozen=True)
class Target:
    """Output files and additional documents."""

    layout: Layout
    pieces: Callable[[], Iterator[TargetPiece]]
    """Pieces in a fixed order."""
    headers: Callable[[], Iterator[tuple[str, Planned]]]
    sizes: dict[str, int]
    """Bytes of each tensor file."""
    documents: Callable[[Files], Documents]
    """Files written last, when the checksums of tensor files are known."""
    copies: Mapping[str, Path] = field(default_factory=dict)
    """Additional files, also in subfolders, and their sources."""

    @property
    def described(self) -> Documents:
        """Return the documents without checksums, before anything is written."""
        return self.documents({name: FileRecord(size, "") for name, size in self.sizes.items()})

    def write_headers(self, folder: Path) -> None:
        """Create every file with its header and size; existing contents are kept."""
        for name, file in self.headers():
            descriptor = os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                os.ftruncate(descriptor, file.size)
                os.pwrite(descriptor, file.header, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync(folder)

    def write_documents(self, folder: Path, files: Files) -> None:
        """Write and sync documents and additional files."""
        for name, origin in self.copies.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(origin, path)
            sync(path)
            sync(path.parent)
        for name, value in self.documents(files).items():
            text = value if isinstance(value, str) else json.dumps(value, indent=1) + "\n"
            write_synced(folder / name, text)
        sync(folder)


@dataclass(frozen=True)
class ExtraFiles:
    """Additional files of a Hugging Face folder."""

    documents: Mapping[str, dict[str, Any] | str]
    copies: Mapping[str, Path] = field(default_factory=dict)


def checkpoint_target(layout: Layout, manifest: Callable[[Files], Manifest]) -> Target:
    """Return a checkpoint target; `manifest` builds its manifest from file records."""
    sizes: dict[str, int] = {}

    def headers() -> Iterator[tuple[str, Planned]]:
        for rank in range(layout.world_size):
            if tensors := shard_tensors(layout, rank):
                yield shard_name(rank), planned(tensors)

    def tensors_of(rank: int) -> dict[str, Stored]:
        file = planned(shard_tensors(layout, rank))
        if file.tensors:
            sizes[shard_name(rank)] = file.size
        return file.tensors

    places = Places(layout, tensors_of)
    places.read_all()

    def pieces() -> Iterator[TargetPiece]:
        for unit in units(layout):
            shape = (len(layout.interval(unit.name, unit.rank)),)
            stored = Stored("F32", shape, places.begin(*unit))
            yield TargetPiece(unit, shard_name(unit.rank), stored)

    def documents(files: Files) -> Documents:
        return {MANIFEST_FILE: manifest_document(manifest(files))}

    return Target(layout, pieces, headers, sizes, documents)


def hugging_face_target(
    model: ModelConfig, dtype: str, most_bytes: int, extra_files: ExtraFiles
) -> Target:
    """Return a Hugging Face target with weight files of at most `most_bytes`."""
    layout = single_rank_layout(model)
    files = planned_files(layout, dtype, most_bytes)
    documents = dict(extra_files.documents)
    if len(files) > 1:
        documents[INDEX_FILE] = index_of(files)
    found = {
        name: (file, plan.tensors[name]) for file, plan in files.items() for name in plan.tensors
    }

    def pieces() -> Iterator[TargetPiece]:
        return (TargetPiece(ShardTensor(0, name, "fp32"), *found[name]) for name in layout.plan)

    sizes = {name: plan.size for name, plan in files.items()}
    headers = partial(iter, files.items())
    return Target(layout, pieces, headers, sizes, lambda _: documents, extra_files.copies)
