"""Llama models in the form of Hugging Face: config.json and safetensors, weights only.

Names and shapes of the parameters are ours; to the readers of files such a folder is a layout of
one rank that holds the whole model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.source import Source
from megagrow.checkpoint.tensor_file import DTYPES, Planned, Stored, planned, read_header
from megagrow.config.model_file import checked_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import InputError
from megagrow.growth.map import Kind
from megagrow.parallel.plan import ParamSpec, parameter_plan
from megagrow.reshard.layout import Layout

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""What LlamaConfig takes for keys that a config.json leaves out."""

_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_ONLY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
"""Keys of which this Llama knows one value."""

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What Hugging Face calls the types of weights, by their names in safetensors' format."""


def whole_layout(model: ModelConfig) -> Layout:
    """One rank that holds everything."""
    plan = parameter_plan(model, tp=1)
    return Layout(plan, (tuple(plan),), zero_stage=0, dp=1, tp=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class HuggingFaceSource(Source):
    """The weights of a Hugging Face folder; there is no optimizer's state."""

    table: Mapping[str, tuple[Path, Stored]]

    def place(self, rank: int, name: str, kind: Kind) -> tuple[Path, Stored]:
        return self.table[name]


def open_hugging_face(folder: Path) -> HuggingFaceSource:
    """A folder with config.json and model.safetensors, or several files and their index.

    InputError for a model that is no plain Llama, and for files that do not hold it.
    """
    model = model_of(_read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    layout = whole_layout(model)
    files = _files(folder)
    headers = {file: read_header(file) for file in files}
    found = {
        name: (file, stored) for file, header in headers.items() for name, stored in header.items()
    }
    table = {name: _checked(folder, spec, found) for name, spec in layout.plan.items()}
    return HuggingFaceSource(
        path=folder, model=model, layout=layout, files=files, kinds=("fp32",), table=table
    )


def model_of(config: dict[str, Any], origin: str) -> ModelConfig:
    """Our config of a config.json. InputError, naming `origin`, for what we have no model of."""
    for key, only in _ONLY.items():
        if config.get(key, only) != only:
            raise InputError(f"{origin}: {key} = {config[key]!r}, only {only!r} is known here")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{origin}: rotary embeddings of type {kind!r}, only 'default' is known")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    values = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    values |= {key: config[key] for key in (*_KEYS, "vocab_size") if key in config}
    values = {key: value for key, value in values.items() if value is not None}
    return checked_model(values | {"rope_theta": theta}, origin)


def config_of(model: ModelConfig, dtype: str, like: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model whose weights are of type `dtype`; the rest of it as in `like`,
    the config.json that the model comes from. transformers 5 reads rope_parameters, 4 the rest."""
    values = model.model_dump()
    theta = values["rope_theta"]
    config = {"architectures": ["LlamaForCausalLM"], **_ONLY, **like, **values}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config["dtype"] = config["torch_dtype"] = DTYPE_NAMES[dtype]
    return config


def planned_files(layout: Layout, dtype: str, most_bytes: int) -> dict[str, Planned]:
    """The files of a model's weights, each of at most `most_bytes` where no tensor is larger."""
    parts = list(_parts(layout.plan, dtype, most_bytes))
    names = [
        WEIGHTS_FILE if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        for i in range(1, len(parts) + 1)
    ]
    return {name: planned(part, {"format": "pt"}) for name, part in zip(names, parts, strict=True)}


def index_of(files: Mapping[str, Planned]) -> dict[str, Any]:
    """The index of a model in several files."""
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
            raise InputError(f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
        return (folder / WEIGHTS_FILE,)
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise InputError(f"{index}: has no weight_map")
    for name in set(names.values()):
        if not (folder / str(name)).is_file():
            raise InputError(f"{folder}: {name}, which its index names, is missing")
    return tuple(folder / name for name in sorted(set(names.values())))


def _checked(
    folder: Path, spec: ParamSpec, found: Mapping[str, tuple[Path, Stored]]
) -> tuple[Path, Stored]:
    if spec.name not in found:
        raise InputError(f"{folder}: its files hold no {spec.name}")
    file, stored = found[spec.name]
    if stored.shape != _shape(spec):
        raise InputError(
            f"{file}: {spec.name} is {list(stored.shape)}, by {CONFIG_FILE} it is "
            f"{list(_shape(spec))}"
        )
    if stored.dtype not in DTYPES:
        raise InputError(
            f"{file}: {spec.name} is of type {stored.dtype}, only {', '.join(DTYPES)} are read"
        )
    return file, stored


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: should hold a JSON object")
    return found
