"""Checkpoints of Megatron-LM's Llama in its torch format: read here, weights only.

A folder has latest_checkpointed_iteration.txt and iter_NNNNNNN/mp_rank_TT/model_optim_rng.pt, a
file for each tensor-parallel rank, in which the model stands beside the arguments of the job
(megatron/training/checkpointing.py). Names of both generations are read.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.source import Source, inside, read_rows
from megagrow.checkpoint.tensor_file import DTYPES, Stored
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face import whole_layout
from megagrow.formats.megatron_args import model_of
from megagrow.formats.megatron_layout import TensorPart, check_tp, fused_tensors, today
from megagrow.formats.torch_file import read_torch_file
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.layout import Block

LATEST_FILE = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
EMBEDDING = "embedding.word_embeddings.weight"

_UNREAD = ("megatron.", "numpy.")
"""Enumerations among the arguments; the state of numpy's random numbers."""

_NO_WEIGHTS = re.compile(r".*(\._extra_state|\.inv_freq)")

_OLDEST_VERSION = 2.0
"""Of the layout: before it, query, key and value did not stand side by side in each head."""

PartLocation = tuple[Path, Stored, TensorPart]
"""A part of a logical tensor, and the tensor of Megatron's in which it stands."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MegatronSource(Source):
    """The weights of a checkpoint of Megatron-LM."""

    table: Mapping[str, list[PartLocation]]
    """Where all parts of each logical tensor are."""

    def read(self, name: str, kind: StateKind, block: Block) -> Tensor:
        values = torch.empty(len(block.rows), len(block.cols))
        for path, stored, part in self.table[name]:
            shared = part.block.within(block)
            if shared:
                width = stored.shape[-1] if len(stored.shape) == 2 else 1
                row = part.row + shared.rows.start - part.block.rows.start
                offset = row * width + shared.cols.start - part.block.cols.start
                read_rows(path, stored, offset, width, inside(values, block, shared))
        return values


def open_megatron(path: Path, model: ModelConfig | None) -> MegatronSource:
    """The folder of one iteration, or one that names its latest.

    `model` is needed where the file's arguments do not say what model it is. InputError for models
    that are no plain Llama, pipeline-parallel files, and files that hold another model.
    """
    files = _rank_files(_iteration(path))
    ranks = [_read_rank(file) for file in files]
    if model is None:
        model = model_of(ranks[0].args, str(files[0]))
    check_tp(model, len(files), str(files[0].parent.parent))
    table: dict[str, list[PartLocation]] = {}
    for rank, file in enumerate(files):
        for name, place in _places(model, len(files), rank, file, ranks[rank].tensors):
            table.setdefault(name, []).append(place)
    return MegatronSource(
        path=files[0].parent.parent,
        model=model,
        layout=whole_layout(model),
        files=files,
        kinds=("fp32",),
        table=table,
    )


@dataclass(frozen=True)
class _Rank:
    args: Namespace | None
    tensors: dict[str, Stored]
    """By the names of today."""


def _iteration(path: Path) -> Path:
    latest = path / LATEST_FILE
    if not latest.is_file():
        return path
    found = latest.read_text(encoding="utf-8", errors="replace").strip()
    if found != "release" and not found.isdecimal():
        raise CheckpointError(f"{latest}: {found!r} is no number of an iteration")
    return path / (found if found == "release" else f"iter_{int(found):07d}")


def _rank_files(folder: Path) -> tuple[Path, ...]:
    files = sorted(folder.glob(f"mp_rank_*/{RANK_FILE}"))
    if not files:
        raise CheckpointError(
            f"{folder}: has no mp_rank_00/{RANK_FILE}; only Megatron-LM's torch format is read: "
            "save with --ckpt-format torch"
        )
    for rank, file in enumerate(files):
        if file.parent.name != f"mp_rank_{rank:02d}":
            raise CheckpointError(
                f"{file.parent}: should be mp_rank_{rank:02d}; a file is missing, or the model is "
                "pipeline-parallel: convert it with Megatron-LM's tools/checkpoint/convert.py "
                "--target-pipeline-parallel-size 1"
            )
    return tuple(files)


def _read_rank(path: Path) -> _Rank:
    found = read_torch_file(path, _UNREAD)
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise CheckpointError(f"{path}: holds no 'model'")
    version = found.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < _OLDEST_VERSION:
        raise CheckpointError(
            f"{path}: its checkpoint_version is {version}, {_OLDEST_VERSION} and newer are read"
        )
    args = found.get("args")
    flat = _flat(found["model"])
    tensors = {today(name): stored for name, stored in flat if not _NO_WEIGHTS.fullmatch(name)}
    return _Rank(args if isinstance(args, Namespace) else None, tensors)


def _flat(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Stored]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, Stored):
            yield f"{above}{key}", value


def _places(
    model: ModelConfig, tp: int, rank: int, path: Path, tensors: dict[str, Stored]
) -> Iterator[tuple[str, PartLocation]]:
    """What a rank's file holds, once it is seen to hold all of it and nothing else."""
    vocabulary = _vocabulary(model, tp, path, tensors)
    wanted = {fused.name: fused for fused in fused_tensors(model, tp, rank, vocabulary)}
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: holds {unknown[0]}, which this Llama does not have")
    for name, fused in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: holds no {name}")
        stored = tensors[name]
        if stored.shape != fused.shape:
            raise CheckpointError(
                f"{path}: {name} is {list(stored.shape)}, in this model it is {list(fused.shape)}"
            )
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is of type {stored.dtype}, only {', '.join(DTYPES)} are read"
            )
        yield from ((part.name, (path, stored, part)) for part in fused.parts)


def _vocabulary(model: ModelConfig, tp: int, path: Path, tensors: dict[str, Stored]) -> int:
    """The rows of all ranks' embeddings, padding included."""
    rows = tensors[EMBEDDING].shape[0] * tp if EMBEDDING in tensors else 0
    if rows < model.vocab_size:
        raise CheckpointError(
            f"{path}: its {EMBEDDING} has {rows} rows for {model.vocab_size} tokens"
        )
    return rows
