"""Reader and writer of DeepSpeed Universal Checkpoints: full parameters, one folder each.

Format of DeepSpeed 0.19 (deepspeed/checkpoint/ds_to_universal.py): zero/PARAMETER/ contains
fp32.pt, exp_avg.pt, exp_avg_sq.pt and step.pt; if converted from ZeRO 3, tensors are flat and the
step is in zero/optimizer_state.pt. DeepSpeed does not record the model; checkpoints written here
record it in megagrow.json.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.source import PlacedSource, Source
from megagrow.checkpoint.tensor_file import DTYPES, Stored, read_elements
from megagrow.common.atomic_files import write_synced
from megagrow.common.json_text import FILE_BYTES, parse_json, read_limited
from megagrow.common.untrusted_values import read_name
from megagrow.config.model_file import checked_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face import POSITION_TABLE, equal_tensors, single_rank_layout
from megagrow.formats.open_source import row_pieces
from megagrow.formats.torch_file import (
    Streamed,
    check_torch_file,
    read_torch_file,
    write_torch_file,
)
from megagrow.model.layers.base import VOCAB
from megagrow.model.layers.table import EMBEDDING, HEAD
from megagrow.parallel.optimizers.rules import ADAMW
from megagrow.parallel.sharding import ADAMW_KINDS, ParamSpec, StateKind
from megagrow.reshard.layout import Block, Layout

LATEST_FILE = "latest_universal"
PARAMETERS = "zero"
OPTIMIZER_FILE = "optimizer_state.pt"
STEP_FILE = "step.pt"
ABOUT_FILE = "megagrow.json"
"""File written and read by megagrow only: model, run and environment, as in a manifest."""

_UNREAD = ("deepspeed.",)
"""Modules of objects that are skipped: loss scalers in the optimizer state."""

TensorFiles = Mapping[tuple[str, StateKind], tuple[Path, Stored]]


@dataclass(frozen=True, eq=False, kw_only=True)
class UniversalSource(PlacedSource):
    """Universal Checkpoint, read as a layout of one rank."""

    table: TensorFiles

    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        return self.table[name, kind]


def open_universal(path: Path, model: ModelConfig | None) -> UniversalSource:
    """Open the folder of one step, or a folder with a latest_universal file that names it.

    `model` is required unless megagrow wrote the checkpoint. Raises CheckpointError if the files
    contain another model, or the moments of only some parameters.
    """
    folder = _step_folder(path)
    about = _about(folder)
    if about:
        written = checked_model(about["model"], str(folder / ABOUT_FILE))
        if model not in (None, written):
            raise CheckpointError(
                f"{folder / ABOUT_FILE}: records a model other than --model; leave out --model"
            )
        model = written
    if model is None:
        raise CheckpointError(f"{folder}: does not record its model; pass it with --model")
    layout = single_rank_layout(model)
    kinds = _kinds(folder, list(layout.plan))
    table = {
        (name, kind): _place(folder / PARAMETERS / name / f"{kind}.pt", spec)
        for name, spec in layout.plan.items()
        for kind in kinds
    }
    _check_all_read(folder / PARAMETERS, layout, table)
    return UniversalSource(
        path=folder,
        model=model,
        layout=layout,
        files=tuple(sorted({file for file, _ in table.values()})),
        kinds=kinds,
        adam_step=_adam_step(folder, list(layout.plan)) if len(kinds) > 1 else 0,
        run=about.get("run"),
        environment=about.get("environment", {}),
        table=table,
    )


def _step_folder(path: Path) -> Path:
    if (path / PARAMETERS).is_dir():
        return path
    latest = path / LATEST_FILE
    if not latest.is_file():
        raise CheckpointError(f"{path}: has neither {PARAMETERS}/ nor {LATEST_FILE}")
    name = read_name(latest)
    if not (path / name / PARAMETERS).is_dir():
        raise CheckpointError(
            f"{latest}: names {name!r}, which is not a Universal Checkpoint in its folder"
        )
    return path / name


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT_FILE
    if not path.is_file():
        return {}
    try:
        content = parse_json(read_limited(path, FILE_BYTES, CheckpointError))
        about = {key: content[key] for key in ("model", "run", "environment")}
        if not isinstance(about["run"], dict | None) or not isinstance(about["environment"], dict):
            raise TypeError("run or environment is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); remove it and pass --model") from error
    return about


_STATE_FILES = {*(f"{kind}.pt" for kind in ADAMW_KINDS), STEP_FILE}


def _check_all_read(folder: Path, layout: Layout, table: TensorFiles) -> None:
    """Raise CheckpointError if the folder contains a parameter or a state that is not read."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or POSITION_TABLE.fullmatch(path.name):
            continue
        if path.name not in layout.plan:
            _check_tied_head(path, layout.plan[EMBEDDING.name], table[EMBEDDING.name, "fp32"])
        if unread := sorted({file.name for file in path.glob("*.pt")} - _STATE_FILES):
            raise CheckpointError(
                f"{path}: contains {unread[0]}, a state that is not read; supported are "
                f"{', '.join(sorted(_STATE_FILES))}"
            )


def _check_tied_head(path: Path, spec: ParamSpec, embedding: tuple[Path, Stored]) -> None:
    """Raise CheckpointError unless a parameter without a place in the model repeats the embedding.

    DeepSpeed's converter adds the tied head of a model with the values of the 16-bit weights.
    """
    if path.name == HEAD.name:
        head = _place(path / "fp32.pt", spec)
        if any(equal_tensors(embedding, head, dtype) for dtype in DTYPES.values()):
            return
    raise CheckpointError(
        f"{path}: a parameter that this model does not have; only complete models can be read"
    )


def _kinds(folder: Path, names: list[str]) -> tuple[StateKind, ...]:
    """Return all state kinds, or only the weights if no parameter has moments."""
    paths = [
        folder / PARAMETERS / name / f"{kind}.pt" for name in names for kind in ADAMW_KINDS[1:]
    ]
    missing = [path for path in paths if not path.is_file()]
    if missing and len(missing) < len(paths):
        raise CheckpointError(f"{missing[0]}: missing, although other parameters have moments")
    return ADAMW_KINDS[:1] if missing else ADAMW_KINDS


def _place(path: Path, spec: ParamSpec) -> tuple[Path, Stored]:
    content = read_torch_file(path, _UNREAD)
    stored = content.get("param") if isinstance(content, dict) else content
    if not isinstance(stored, Stored):
        raise CheckpointError(f"{path}: has no tensor 'param'")
    shapes = [(spec.rows * spec.cols,)] + ([] if spec.is_vector else [(spec.rows, spec.cols)])
    if stored.shape not in shapes:
        raise CheckpointError(
            f"{path}: {spec.name} has shape {list(stored.shape)}, this model requires "
            f"{list(shapes[-1])}"
        )
    if stored.dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: has dtype {stored.dtype}, supported are {', '.join(DTYPES)}"
        )
    return path, stored


def _adam_step(folder: Path, names: list[str]) -> int:
    """Return Adam's step count, equal for all parameters."""
    paths = [folder / PARAMETERS / name / STEP_FILE for name in names]
    if not any(path.is_file() for path in paths):
        path = folder / PARAMETERS / OPTIMIZER_FILE
        content = read_torch_file(path, _UNREAD)
        try:
            return _number(path, content["optimizer_state_dict"]["state"][0]["step"])
        except (LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: does not record Adam's step") from error
    steps = {_number(path, read_torch_file(path)): path for path in paths}
    if len(steps) > 1:
        (first, one), (second, other), *_ = steps.items()
        raise CheckpointError(f"Adam's steps differ: {first} in {one}, {second} in {other}")
    return next(iter(steps))


def _number(path: Path, value: Any) -> int:
    if isinstance(value, Stored) and value.dtype in DTYPES and value.nbytes == value.item_bytes:
        value = read_elements(path, value, range(1)).item()
    if not isinstance(value, int | float) or not 0 <= value < 2**53 or value != int(value):
        raise CheckpointError(f"{path}: not a step count")
    return int(value)


DEEPSPEED_VERSION = "0.19.8"
"""DeepSpeed release of this format; its loader rejects files without a version."""


def universal_bytes(source: Source) -> int:
    """Return the total bytes of the tensors."""
    return 12 * sum(spec.rows * spec.cols for spec in source.layout.plan.values())


def write_universal(source: Source, out: Path, step: int, advance: Callable[[int], None]) -> None:
    """Write a folder that contains the folder of one step of the run.

    States that the source lacks are zero; Muon's cannot be written and raises CheckpointError.
    `advance` is called with the bytes of tensors written.
    """
    if source.layout.matrices != ADAMW:
        raise CheckpointError(
            f"{source.path}: Muon's momentum_buffer has no place in a Universal Checkpoint; export "
            "the weights with megagrow convert hf-export"
        )
    folder = out / f"global_step{step}_universal"
    for name, spec in source.layout.plan.items():
        parameter = folder / PARAMETERS / name
        parameter.mkdir(parents=True)
        for kind in ADAMW_KINDS:
            _write(parameter / f"{kind}.pt", _parameter(source, spec, kind), advance)
        _write(parameter / STEP_FILE, _step(source), advance)
    _write(folder / PARAMETERS / OPTIMIZER_FILE, _optimizer(source), advance)
    # DeepSpeed reads the file without prefix under ZeRO 1 and 2, the other under ZeRO 3.
    for prefix in ("", "zero_pp_rank_0_"):
        name = f"{prefix}mp_rank_00_model_states.pt"
        _write(folder / name, _engine_state(source, step), advance)
    about = {
        "model": source.model.model_dump(),
        "run": source.run,
        "environment": source.environment,
    }
    write_synced(folder / ABOUT_FILE, json.dumps(about, indent=1) + "\n")
    write_synced(out / LATEST_FILE, folder.name)


def _write(path: Path, value: Any, advance: Callable[[int], None]) -> None:
    write_torch_file(path, value, advance)
    check_torch_file(path)


def _parameter(source: Source, spec: ParamSpec, kind: StateKind) -> dict[str, Any]:
    shape = (spec.rows,) if spec.is_vector else (spec.rows, spec.cols)
    full = Block(range(spec.rows), range(spec.cols))
    pieces = partial(row_pieces, source, spec.name, kind, full)
    content: dict[str, Any] = {"param": Streamed("F32", shape, pieces)}
    # The loader uses these to slice a tensor for tensor parallelism and to pad the vocabulary.
    content["cat_dim"] = spec.tp_dim or 0
    if spec.row_role.axis == VOCAB:
        content["vocab_tensor"] = True
    return content


def _step(source: Source) -> Streamed:
    """Return Adam's step as an fp32 scalar tensor, as in torch's AdamW."""
    return Streamed("F32", (), lambda: iter([torch.tensor(float(source.adam_step))]))


def _optimizer(source: Source) -> dict[str, Any]:
    # One group per parameter: the loading job has no more. ZeRO 3 reads the inner groups.
    groups: list[dict[str, Any]] = [{"params": []} for _ in source.layout.plan]
    inner = {"state": {0: {"step": _step(source)}}, "param_groups": groups}
    state = {"param_groups": groups, "optimizer_state_dict": inner}
    return {"ds_version": DEEPSPEED_VERSION, **state}


def _engine_state(source: Source, step: int) -> dict[str, Any]:
    return {
        "module": {},
        "ds_version": DEEPSPEED_VERSION,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": step,
        "skipped_steps": 0,
        "lr_scheduler": {"last_batch_iteration": step - 1},
        "universal_checkpoint_info": {
            "universal_checkpoint_version": 0.2,
            "original_vocab_size": source.model.vocab_size,
        },
    }
