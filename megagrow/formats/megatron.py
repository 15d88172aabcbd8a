"""Reader of Megatron-LM Llama checkpoints in torch format, weights only.

A folder contains latest_checkpointed_iteration.txt and iter_NNNNNNN/mp_rank_TT/model_optim_rng.pt,
one file per tensor-parallel rank with the model and the arguments of the job
(megatron/training/checkpointing.py). Tensor names of Megatron-LM's core and of older versions are
supported.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.source import Source, inside, read_rows
from megagrow.checkpoint.tensor_file import DTYPES, Stored
from megagrow.common.atomic_files import write_synced
from megagrow.common.untrusted_values import read_name
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.formats.hugging_face import single_rank_layout
from megagrow.formats.megatron_args import args_of, args_warnings, check_model, model_of
from megagrow.formats.megatron_layout import (
    Fused,
    TensorPart,
    check_fits,
    current_name,
    fused_tensors,
    padded_vocabulary,
)
from megagrow.formats.open_source import ELEMENTS_AT_ONCE, row_pieces
from megagrow.formats.torch_file import (
    Streamed,
    check_torch_file,
    read_torch_file,
    write_torch_file,
)
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.layout import Block

LATEST_FILE = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
EMBEDDING = "embedding.word_embeddings.weight"

_UNREAD = ("megatron.", "numpy.")
"""Modules of objects that are skipped: enumerations in the arguments, numpy's random state."""

_NO_WEIGHTS = re.compile(r".*(\._extra_state|\.inv_freq)")
"""State of Transformer Engine's fp8 and position tables, which are computed from the arguments."""

_TRAINING = (
    *("optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "rerun_state_machine"),
    *("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state"),
    "rng_tracker_states",
)
"""Entries of a file that only the job that wrote it needs."""

_OLDEST_VERSION = 2.0
"""Oldest supported layout version: before it, query, key and value were not interleaved by head."""

PartLocation = tuple[Path, Stored, TensorPart]
"""Part of a logical tensor and the Megatron-LM tensor that contains it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MegatronSource(Source):
    """Weights of a Megatron-LM checkpoint."""

    table: Mapping[str, list[PartLocation]]
    """Locations of all parts of each logical tensor."""

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
    """Open the folder of one iteration, or a folder with a file that names the latest iteration.

    `model` is required if the checkpoint's arguments do not determine it. Raises CheckpointError
    for models other than plain Llama, pipeline-parallel files, files of another model, and files
    with tensors that the model does not have.
    """
    files = _rank_files(_iteration(path))
    ranks = [_read_rank(file) for file in files]
    args = ranks[0].args
    if model is None:
        model = model_of(args, str(files[0]))
    elif args is not None:
        check_model(args, model, str(files[0]))
    check_fits(model, [rank.tensors for rank in ranks], str(files[0].parent.parent))
    table: dict[str, list[PartLocation]] = {}
    for rank, file in enumerate(files):
        for name, location in _locations(model, len(files), rank, file, ranks[rank].tensors):
            table.setdefault(name, []).append(location)
    warnings = args_warnings(args, str(files[0]))
    if any(rank.has_optimizer for rank in ranks):
        warnings.append(f"{files[0]}: its optimizer state is not read; the moments are zero")
    return MegatronSource(
        path=files[0].parent.parent,
        model=model,
        layout=single_rank_layout(model),
        files=files,
        kinds=("fp32",),
        warnings=tuple(warnings),
        table=table,
    )


@dataclass(frozen=True)
class _Rank:
    args: Namespace | None
    tensors: dict[str, Stored]
    """Tensors by current names."""
    has_optimizer: bool


def _iteration(path: Path) -> Path:
    latest = path / LATEST_FILE
    if not latest.is_file():
        return path
    iteration = read_name(latest)
    if iteration != "release" and not (iteration.isdecimal() and len(iteration) < 20):
        raise CheckpointError(f"{latest}: {iteration!r:.100} is not an iteration number")
    return path / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")


def _rank_files(folder: Path) -> tuple[Path, ...]:
    files = sorted(folder.glob(f"mp_rank_*/{RANK_FILE}"))
    if not files:
        raise CheckpointError(
            f"{folder}: has no mp_rank_00/{RANK_FILE}; only Megatron-LM's torch format is "
            "supported: save with --ckpt-format torch"
        )
    for rank, file in enumerate(files):
        if file.parent.name != f"mp_rank_{rank:02d}":
            raise CheckpointError(
                f"{file.parent}: expected mp_rank_{rank:02d}; a file is missing, or the model is "
                "pipeline-parallel: convert it with Megatron-LM's tools/checkpoint/convert.py "
                "--target-pipeline-parallel-size 1"
            )
    return tuple(files)


def _read_rank(path: Path) -> _Rank:
    content = read_torch_file(path, _UNREAD)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path}: has no 'model'")
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or not version >= _OLDEST_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint_version {version} is not supported; requires {_OLDEST_VERSION} or "
            "newer"
        )
    others = {key: value for key, value in content.items() if key not in ("model", *_TRAINING)}
    if unread := sorted(str(key) for key, value in others.items() if _holds_tensor(value)):
        raise CheckpointError(
            f"{path}: {unread[0][:200]!r} contains tensors that are not read; only a model without "
            "virtual pipeline stages is supported"
        )
    tensors: dict[str, Stored] = {}
    for old, stored in _flat(content["model"], path):
        name = current_name(old)
        if name in tensors:
            raise CheckpointError(f"{path}: contains {name} twice, under two names")
        tensors[name] = stored
    args = content.get("args")
    return _Rank(args if isinstance(args, Namespace) else None, tensors, "optimizer" in content)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Stored) or (isinstance(value, list) and any(map(_holds_tensor, value)))


def _flat(tree: Mapping[Any, Any], path: Path, above: str = "") -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a model by name. Raises CheckpointError for any other value."""
    for key, value in tree.items():
        name = f"{above}{key}"
        if _NO_WEIGHTS.fullmatch(name):
            continue
        if isinstance(value, dict):
            yield from _flat(value, path, f"{name}.")
        elif isinstance(value, Stored):
            yield name, value
        else:
            raise CheckpointError(f"{path}: {name[:200]} is of {type(value)}, not a tensor")


def _locations(
    model: ModelConfig, tp: int, rank: int, path: Path, tensors: dict[str, Stored]
) -> Iterator[tuple[str, PartLocation]]:
    """Yield the tensor parts of a rank's file.

    Raises CheckpointError unless the file contains exactly the tensors of the model.
    """
    vocabulary = _vocabulary(model, tp, path, tensors)
    wanted = {fused.name: fused for fused in fused_tensors(model, tp, rank, vocabulary)}
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: contains {unknown[0]}, which this Llama does not have")
    for name, fused in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: does not contain {name}")
        stored = tensors[name]
        if stored.shape != fused.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(stored.shape)}, this model requires "
                f"{list(fused.shape)}"
            )
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} has dtype {stored.dtype}, supported are {', '.join(DTYPES)}"
            )
        yield from ((part.name, (path, stored, part)) for part in fused.parts)


def _vocabulary(model: ModelConfig, tp: int, path: Path, tensors: dict[str, Stored]) -> int:
    """Return the rows of all ranks' embeddings, padding included."""
    rows = sum(tensors[EMBEDDING].shape[:1]) * tp if EMBEDDING in tensors else 0
    if rows < model.vocab_size:
        raise CheckpointError(
            f"{path}: {EMBEDDING} has {rows} rows, fewer than the {model.vocab_size} tokens"
        )
    return rows


VERSION = 3.0
"""Megatron-LM's checkpoint_version."""


class MegatronTarget:
    """Megatron-LM checkpoint to be written from a source's weights."""

    def __init__(self, source: Source, tp: int, divisible_by: int, dtype: str) -> None:
        """Plan the export.

        Args:
            source: weights to export.
            tp: tensor-parallel size.
            divisible_by: --make-vocab-size-divisible-by.
            dtype: safetensors dtype name, e.g. `BF16`.
        """
        self._source = source
        self._tp = tp
        self._dtype = dtype
        self._vocabulary = padded_vocabulary(source.model, tp, divisible_by)
        self._args = args_of(source.model, tp, divisible_by, self._vocabulary)

    @property
    def nbytes(self) -> int:
        """Total bytes of the tensors."""
        tensors = (fused for rank in range(self._tp) for fused in self._tensors(rank))
        elements = sum(fused.shape[0] * fused.cols for fused in tensors)
        return elements * DTYPES[self._dtype].itemsize

    def write(self, out: Path, iteration: int, advance: Callable[[int], None]) -> None:
        """Write the folder; `advance` is called with the bytes of tensors written."""
        for rank in range(self._tp):
            folder = out / f"iter_{iteration:07d}" / f"mp_rank_{rank:02d}"
            folder.mkdir(parents=True)
            write_torch_file(folder / RANK_FILE, self._file(rank, iteration), advance)
            check_torch_file(folder / RANK_FILE)
        write_synced(out / LATEST_FILE, str(iteration))

    def _file(self, rank: int, iteration: int) -> dict[str, Any]:
        model = {
            fused.name: Streamed(self._dtype, fused.shape, partial(self._pieces, fused))
            for fused in self._tensors(rank)
        }
        return {
            "args": self._args,
            "checkpoint_version": VERSION,
            "iteration": iteration,
            "model": model,
        }

    def _tensors(self, rank: int) -> Iterator[Fused]:
        return fused_tensors(self._source.model, self._tp, rank, self._vocabulary)

    def _pieces(self, fused: Fused) -> Iterator[Tensor]:
        row = 0
        for part in fused.parts:
            yield from row_pieces(self._source, part.name, "fp32", part.block)
            row = part.row + len(part.block.rows)
        at_once = max(1, ELEMENTS_AT_ONCE // fused.cols)
        for first in range(row, fused.shape[0], at_once):  # vocabulary padding
            yield torch.zeros(min(at_once, fused.shape[0] - first), fused.cols)
