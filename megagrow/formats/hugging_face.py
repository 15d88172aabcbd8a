"""Hugging Face folders of Llama models: config.json and safetensors, weights only.

Parameter names and shapes equal the native ones; such a folder is read as a layout of one rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.source import PlacedSource
from megagrow.checkpoint.tensor_file import DTYPES, Planned, Stored, planned, read_header
from megagrow.common.json_text import read_json
from megagrow.common.safe_paths import is_plain_name
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face_config import CONFIG_FILE, model_of, origin_of
from megagrow.parallel.sharding import ParamSpec, StateKind, parameter_plan
from megagrow.reshard.layout import Layout

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def single_rank_layout(model: ModelConfig) -> Layout:
    """Return the layout of one rank that holds the full model."""
    plan = parameter_plan(model, tp=1)
    return Layout(plan, (tuple(plan),), zero_stage=0, dp=1, tp=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class HuggingFaceSource(PlacedSource):
    """Weights of a Hugging Face folder, without optimizer state."""

    table: Mapping[str, tuple[Path, Stored]]

    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        return self.table[name]


def open_hugging_face(folder: Path) -> HuggingFaceSource:
    """Open a folder with config.json and model.safetensors, or several files and their index.

    Raises CheckpointError if the model is not a plain Llama or the files do not contain it.
    """
    config = read_json(folder / CONFIG_FILE, CheckpointError)
    model = model_of(config, str(folder / CONFIG_FILE))
    layout = single_rank_layout(model)
    files = _files(folder)
    headers = {file: read_header(file) for file in files}
    tensors = {
        name: (file, stored) for file, header in headers.items() for name, stored in header.items()
    }
    table = {name: _checked(folder, spec, tensors) for name, spec in layout.plan.items()}
    return HuggingFaceSource(
        path=folder,
        model=model,
        layout=layout,
        files=files,
        kinds=("fp32",),
        environment=origin_of(folder, config),
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
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
        return (folder / WEIGHTS_FILE,)
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


def _checked(
    folder: Path, spec: ParamSpec, tensors: Mapping[str, tuple[Path, Stored]]
) -> tuple[Path, Stored]:
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
