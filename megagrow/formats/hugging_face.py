"""Hugging Face folders of the supported families: config.json and safetensors, weights only.

Parameter names and shapes equal the native ones; such a folder is read as a layout of one rank.
transformers is the reference for which files and tensors are read; any other tensor is refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.source import PlacedSource
from megagrow.checkpoint.tensor_file import (
    DTYPES,
    Planned,
    Stored,
    planned,
    read_elements,
    read_header,
)
from megagrow.common.json_text import read_json
from megagrow.common.untrusted_values import is_plain_name
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face_config import CONFIG_FILE, model_of
from megagrow.formats.hugging_face_families import FAMILIES
from megagrow.formats.hugging_face_origin import read_origin
from megagrow.model.layers.table import EMBEDDING, HEAD
from megagrow.parallel.sharding import ParamSpec, StateKind, parameter_plan
from megagrow.reshard.layout import Layout

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

POSITION_TABLE = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
"""Position tables that old versions of transformers stored; they are computed from the config."""

_ELEMENTS_AT_ONCE = 2**20
"""Elements of two tensors compared at a time."""

Tensors = Mapping[str, tuple[Path, Stored]]
"""Tensors of a folder by name, with their files."""


def single_rank_layout(model: ModelConfig) -> Layout:
    """Return the layout of one rank that holds the full model."""
    plan = parameter_plan(model, tp=1)
    return Layout(plan, (tuple(plan),), zero_stage=0, dp=1, tp=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class HuggingFaceSource(PlacedSource):
    """Weights of a Hugging Face folder, without optimizer state."""

    table: Tensors

    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        return self.table[name]


def open_hugging_face(folder: Path) -> HuggingFaceSource:
    """Open a folder with config.json and model.safetensors, or several files and their index.

    Raises CheckpointError if the model is of another family or has unsupported features, or the
    files do not contain exactly its tensors.
    """
    config = read_json(folder / CONFIG_FILE, CheckpointError)
    model = model_of(config, str(folder / CONFIG_FILE))
    origin, warnings = read_origin(folder, config)
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER_FILE}: transformers would add this adapter to the weights; merge "
            "it into them, or remove it"
        )
    files = _files(folder)
    if files == (folder / WEIGHTS_FILE,) and (folder / INDEX_FILE).is_file():
        warnings.append(f"{folder / INDEX_FILE} is ignored: {WEIGHTS_FILE} exists")
    tensors: Tensors = _tensors(files)
    if model.tie_word_embeddings:
        model, tensors = _untied(folder, model, tensors, warnings)
    layout = single_rank_layout(model)
    table = {name: _checked(folder, spec, tensors) for name, spec in layout.plan.items()}
    _check_all_read(tensors, table, FAMILIES[model.model_type].architecture)
    return HuggingFaceSource(
        path=folder,
        model=model,
        layout=layout,
        files=files,
        kinds=("fp32",),
        environment=origin.as_environment(),
        warnings=tuple(warnings),
        table=table,
    )


def planned_files(layout: Layout, dtype: str, most_bytes: int) -> dict[str, Planned]:
    """Plan the files of a model's weights, each at most `most_bytes` unless a tensor is larger."""
    parts = list(_parts(layout.plan, dtype, most_bytes))
    names = [
        WEIGHTS_FILE if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        for i in range(1, len(parts) + 1)
    ]
    return {name: planned(part, {"format": "pt"}) for name, part in zip(names, parts, strict=True)}


def index_of(files: Mapping[str, Planned]) -> dict[str, Any]:
    """Return the index of a model stored in several files."""
    placed = [(tensor, file) for file, plan in files.items() for tensor in plan.tensors]
    total = sum(stored.nbytes for plan in files.values() for stored in plan.tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed))}


def _parts(
    plan: Mapping[str, ParamSpec], dtype: str, most_bytes: int
) -> Iterator[dict[str, Stored]]:
    part: dict[str, Stored] = {}
    size = 0
    for name, spec in plan.items():
        stored = Stored(dtype, _shape(spec))
        if part and size + stored.nbytes > most_bytes:
            yield part
            part, size = {}, 0
        part[name] = stored
        size += stored.nbytes
    yield part


def _shape(spec: ParamSpec) -> tuple[int, ...]:
    return (spec.rows,) if spec.is_vector else (spec.rows, spec.cols)


def _files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files; a single file has precedence over an index, as in transformers."""
    if (folder / WEIGHTS_FILE).is_file():
        return (folder / WEIGHTS_FILE,)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    names = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    for name in names.values():
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index}: {str(name)[:100]!r} is not the name of a file in its folder"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name}, listed in its index, is missing")
    return tuple(folder / name for name in sorted(set(names.values())))


def _tensors(files: tuple[Path, ...]) -> dict[str, tuple[Path, Stored]]:
    """Return all tensors of the files. Raises CheckpointError if two files contain one name."""
    found: dict[str, tuple[Path, Stored]] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise CheckpointError(f"{file}: contains {name}, as does {found[name][0].name}")
            found[name] = (file, stored)
    return found


def _untied(
    folder: Path, model: ModelConfig, tensors: Tensors, warnings: list[str]
) -> tuple[ModelConfig, Tensors]:
    """Resolve the head of a model whose config ties it to the embedding, as transformers does.

    A head that differs from the embedding makes the model untied; a head without an embedding is
    the embedding.
    """
    if HEAD.name not in tensors:
        return model, tensors
    others = {name: place for name, place in tensors.items() if name != HEAD.name}
    if EMBEDDING.name not in tensors:
        return model, others | {EMBEDDING.name: tensors[HEAD.name]}
    untied = model.model_copy(update={"tie_word_embeddings": False})
    plan = single_rank_layout(untied).plan
    embedding = _checked(folder, plan[EMBEDDING.name], tensors)
    if equal_tensors(embedding, _checked(folder, plan[HEAD.name], tensors)):
        return model, others
    warnings.append(
        f"{folder / CONFIG_FILE}: tie_word_embeddings = true, but {HEAD.name} differs from "
        f"{EMBEDDING.name}; the model is read as untied, as in transformers"
    )
    return untied, tensors


def equal_tensors(
    one: tuple[Path, Stored], other: tuple[Path, Stored], dtype: torch.dtype = torch.float32
) -> bool:
    """Return True if the values of a tensor, rounded to `dtype`, equal another of its size."""
    size = prod(one[1].shape)
    for first in range(0, size, _ELEMENTS_AT_ONCE):
        span = range(first, min(first + _ELEMENTS_AT_ONCE, size))
        rounded = read_elements(*one, span).to(dtype).float()
        if not torch.equal(rounded, read_elements(*other, span).float()):
            return False
    return True


def _check_all_read(tensors: Tensors, table: Tensors, architecture: str) -> None:
    unread = sorted(
        name for name in tensors.keys() - table.keys() if not POSITION_TABLE.fullmatch(name)
    )
    if unread:
        more = f" and {len(unread) - 1} more tensors" if len(unread) > 1 else ""
        raise CheckpointError(
            f"{tensors[unread[0]][0]}: contains {unread[0][:200]}{more}, which the "
            f"{architecture} of {CONFIG_FILE} does not have; only complete models can be read"
        )


def _checked(folder: Path, spec: ParamSpec, tensors: Tensors) -> tuple[Path, Stored]:
    if spec.name not in tensors:
        raise CheckpointError(f"{folder}: its files do not contain {spec.name}")
    file, stored = tensors[spec.name]
    if stored.shape != _shape(spec):
        raise CheckpointError(
            f"{file}: {spec.name} has shape {list(stored.shape)}, {CONFIG_FILE} requires "
            f"{list(_shape(spec))}"
        )
    if stored.dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {spec.name} has dtype {stored.dtype}, supported are {', '.join(DTYPES)}"
        )
    return file, stored
