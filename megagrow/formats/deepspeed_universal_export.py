"""Universal Checkpoints written: what DeepSpeed's loader reads at any ZeRO stage, and no more.

Hyper-parameters are left to the configuration of the job that loads: of those in the file
DeepSpeed would give the first group's to all groups under ZeRO 3, and under ZeRO 1 and 2 it
expects the groups of the job that saved.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.shards import KINDS
from megagrow.checkpoint.source import Source
from megagrow.common.file_io import sync
from megagrow.formats.deepspeed_universal import (
    ABOUT_FILE,
    LATEST_FILE,
    OPTIMIZER_FILE,
    PARAMETERS,
    STEP_FILE,
)
from megagrow.formats.pieces import row_pieces
from megagrow.formats.torch_writing import Streamed, check_torch_file, write_torch_file
from megagrow.growth.map import Kind
from megagrow.parallel.sharding import ParamSpec
from megagrow.reshard.layout import Block

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
    _write_text(folder / ABOUT_FILE, json.dumps(about, indent=1) + "\n")
    _write_text(out / LATEST_FILE, folder.name)


def _write(path: Path, value: Any, advance: Callable[[int], None]) -> None:
    write_torch_file(path, value, advance)
    check_torch_file(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _parameter(source: Source, spec: ParamSpec, kind: Kind) -> dict[str, Any]:
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
