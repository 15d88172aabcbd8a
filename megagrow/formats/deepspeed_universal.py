"""DeepSpeed's Universal Checkpoints: every parameter whole, in a folder of its own, and read here.

The form is that of DeepSpeed 0.19 (deepspeed/checkpoint/ds_to_universal.py): zero/PARAMETER/ has
fp32.pt, exp_avg.pt, exp_avg_sq.pt and step.pt; converted from ZeRO 3 the tensors are flat and the
step stands in zero/optimizer_state.pt. What model it is, DeepSpeed does not say; ours say it in a
file beside.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.shards import KINDS
from megagrow.checkpoint.source import PlacedSource, Source
from megagrow.checkpoint.tensor_file import DTYPES, Stored, read_elements
from megagrow.common.atomic_files import write_synced
from megagrow.common.json_text import parse_json
from megagrow.common.safe_paths import is_plain_name
from megagrow.config.includes import checked_model
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face import whole_layout
from megagrow.formats.open_source import row_pieces
from megagrow.formats.torch_file import (
    Streamed,
    check_torch_file,
    read_torch_file,
    write_torch_file,
)
from megagrow.growth.map import StateKind
from megagrow.parallel.sharding import ParamSpec
from megagrow.reshard.layout import Block

LATEST_FILE = "latest_universal"
PARAMETERS = "zero"
OPTIMIZER_FILE = "optimizer_state.pt"
STEP_FILE = "step.pt"
ABOUT_FILE = "megagrow.json"
"""What only megagrow writes and reads: model, run and environment, as in a manifest."""

_UNREAD = ("deepspeed.",)
"""Loss scalers stand among the optimizer's state."""

TensorFiles = Mapping[tuple[str, StateKind], tuple[Path, Stored]]


@dataclass(frozen=True, eq=False, kw_only=True)
class UniversalSource(PlacedSource):
    """A Universal Checkpoint; to the readers of files a layout of one rank."""

    table: TensorFiles

    def place(self, rank: int, name: str, kind: StateKind) -> tuple[Path, Stored]:
        return self.table[name, kind]


def open_universal(path: Path, model: ModelConfig | None) -> UniversalSource:
    """The folder of one step, or one with a file latest_universal that names it.

    `model` is needed unless megagrow has written it. InputError if the files hold another model,
    or moments of some parameters only.
    """
    folder = _step_folder(path)
    about = _about(folder)
    if about:
        written = checked_model(about["model"], str(folder / ABOUT_FILE))
        if model not in (None, written):
            raise CheckpointError(
                f"{folder / ABOUT_FILE}: says that it is another model than --model"
            )
        model = written
    if model is None:
        raise CheckpointError(f"{folder}: does not say what model it is; name it by --model")
    layout = whole_layout(model)
    kinds = _kinds(folder, list(layout.plan))
    table = {
        (name, kind): _place(folder / PARAMETERS / name / f"{kind}.pt", spec)
        for name, spec in layout.plan.items()
        for kind in kinds
    }
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
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not is_plain_name(name) or not (path / name / PARAMETERS).is_dir():
        raise CheckpointError(
            f"{latest}: names {name!r}, which is no Universal Checkpoint beside it"
        )
    return path / name


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT_FILE
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
        about = {key: found[key] for key in ("model", "run", "environment")}
        if not isinstance(about["run"], dict | None) or not isinstance(about["environment"], dict):
            raise TypeError("its run or environment is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); remove it and give --model") from error
    return about


def _kinds(folder: Path, names: list[str]) -> tuple[StateKind, ...]:
    """All kinds, or weights alone where no parameter has moments."""
    paths = [folder / PARAMETERS / name / f"{kind}.pt" for name in names for kind in KINDS[1:]]
    missing = [path for path in paths if not path.is_file()]
    if missing and len(missing) < len(paths):
        raise CheckpointError(
            f"{missing[0]}: is missing, while other parameters have their moments"
        )
    return KINDS[:1] if missing else KINDS


def _place(path: Path, spec: ParamSpec) -> tuple[Path, Stored]:
    found = read_torch_file(path, _UNREAD)
    stored = found.get("param") if isinstance(found, dict) else found
    if not isinstance(stored, Stored):
        raise CheckpointError(f"{path}: holds no tensor 'param'")
    shapes = [(spec.rows * spec.cols,)] + ([] if spec.is_vector else [(spec.rows, spec.cols)])
    if stored.shape not in shapes:
        raise CheckpointError(
            f"{path}: {spec.name} is {list(stored.shape)}, in this model it is {list(shapes[-1])}"
        )
    if stored.dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: is of type {stored.dtype}, only {', '.join(DTYPES)} are read"
        )
    return path, stored


def _adam_step(folder: Path, names: list[str]) -> int:
    """The one number of updates that all parameters have had."""
    paths = [folder / PARAMETERS / name / STEP_FILE for name in names]
    if not any(path.is_file() for path in paths):
        path = folder / PARAMETERS / OPTIMIZER_FILE
        found = read_torch_file(path, _UNREAD)
        try:
            return _number(path, found["optimizer_state_dict"]["state"][0]["step"])
        except (LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: does not say Adam's step") from error
    steps = {_number(path, read_torch_file(path)): path for path in paths}
    if len(steps) > 1:
        (first, one), (second, other), *_ = steps.items()
        raise CheckpointError(f"Adam's steps differ: {one} says {first}, {other} says {second}")
    return next(iter(steps))


def _number(path: Path, value: Any) -> int:
    if isinstance(value, Stored) and value.dtype in DTYPES and value.nbytes == value.item_bytes:
        value = read_elements(path, value, range(1)).item()
    if not isinstance(value, int | float) or not 0 <= value < 2**53 or value != int(value):
        raise CheckpointError(f"{path}: is no number of steps")
    return int(value)


DEEPSPEED_VERSION = "0.19.8"
"""The release whose form this is; its loader refuses a file that names none."""


def universal_bytes(source: Source) -> int:
    """Bytes of all tensors."""
    return 12 * sum(spec.rows * spec.cols for spec in source.layout.plan.values())


def write_universal(source: Source, out: Path, step: int, advance: Callable[[int], None]) -> None:
    """Writes a folder, and in it that of one step of the run; kinds of state that the source does
    not have are zeros. `advance` is told the bytes of tensors as they are written."""
    folder = out / f"global_step{step}_universal"
    for name, spec in source.layout.plan.items():
        place = folder / PARAMETERS / name
        place.mkdir(parents=True)
        for kind in KINDS:
            _write(place / f"{kind}.pt", _parameter(source, spec, kind), advance)
        _write(place / STEP_FILE, _step(source), advance)
    _write(folder / PARAMETERS / OPTIMIZER_FILE, _optimizer(source), advance)
    # DeepSpeed looks for the first of them under ZeRO 1 and 2, for the second under ZeRO 3.
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
    whole = Block(range(spec.rows), range(spec.cols))
    pieces = partial(row_pieces, source, spec.name, kind, whole)
    found: dict[str, Any] = {"param": Streamed("F32", shape, pieces)}
    # By these the loader cuts a tensor for tensor parallelism, and pads the vocabulary.
    found["cat_dim"] = 1 if spec.col_role in ("query", "ffn") else 0
    if spec.row_role == "vocab":
        found["vocab_tensor"] = True
    return found


def _step(source: Source) -> Streamed:
    """As torch's AdamW keeps it: a tensor of one fp32 number."""
    return Streamed("F32", (), lambda: iter([torch.tensor(float(source.adam_step))]))


def _optimizer(source: Source) -> dict[str, Any]:
    # As many groups as the loading job can have; ZeRO 3 looks into the inner ones.
    groups: list[dict[str, Any]] = [{"params": []} for _ in source.layout.plan]
    inner = {"state": {0: {"step": _step(source)}}, "param_groups": groups}
    return {
        "ds_version": DEEPSPEED_VERSION,
        "param_groups": groups,
        "optimizer_state_dict": inner,
    }


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
