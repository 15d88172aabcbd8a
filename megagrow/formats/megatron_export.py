"""Writer of Megatron-LM Llama checkpoints in torch format, with the names of its core."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.source import Source
from megagrow.checkpoint.tensor_file import DTYPES
from megagrow.common.atomic_files import write_synced
from megagrow.formats.megatron import LATEST_FILE, RANK_FILE
from megagrow.formats.megatron_args import args_of
from megagrow.formats.megatron_layout import Fused, fused_tensors, padded_vocabulary
from megagrow.formats.open_source import ELEMENTS_AT_ONCE, row_pieces
from megagrow.formats.torch_file import Streamed, check_torch_file, write_torch_file

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
