"""Batches: the part of the stream that one rank reads in one accumulation step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megagrow.config.schema import BatchConfig, CorpusConfig, DataConfig
from megagrow.data.indexed import IndexedCorpus
from megagrow.data.manifest import CorpusManifest
from megagrow.data.stream import NO_LABEL, Tokens, TokenStream
from megagrow.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Sequences of the stream, int64 tensors on the CPU."""

    input_ids: torch.Tensor
    """[sequences, length]"""
    labels: torch.Tensor
    """The next tokens, [sequences, length]; -100 where there is none that counts."""
    position_ids: torch.Tensor
    """[sequences, length]; from 0 again at each boundary if `reset_position_ids` is on."""
    document_ids: torch.Tensor | None
    """Which document of its sequence a token is in, from 0, [sequences, length]; a token sees
    only its own document. None if `reset_attention_mask` is off."""


def open_stream(
    corpora: Sequence[CorpusConfig], seed: int, block_size: int, shuffle: bool = True
) -> TokenStream:
    """Open the corpora of a run and blend them. InputError if one of them is damaged."""
    opened = [IndexedCorpus(corpus.path) for corpus in corpora]
    weights = [corpus.weight for corpus in corpora]
    return TokenStream(opened, weights, seed, block_size, shuffle)


def sequences_of(
    global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """For each accumulation step, which sequences of the global batch this rank reads.

    Over all ranks and steps each sequence comes exactly once, so the batch is always the same.
    """
    per_step = micro_batch_size * dp_size
    if global_batch_size % per_step:
        raise DataError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
            f"{micro_batch_size} x data parallel {dp_size}"
        )
    first = dp_rank * micro_batch_size
    starts = range(first, global_batch_size, per_step)
    return [list(range(start, start + micro_batch_size)) for start in starts]


def read_micro_batches(
    reader: "BatchReader", position: int, batch: BatchConfig, dp_rank: int, dp_size: int
) -> list["Batch"]:
    """Read this rank's micro-batches of the global batch that starts at a stream position.

    Raises:
        DataError: the stream cannot be read.
    """
    sizes = batch.global_batch_size, batch.micro_batch_size
    return [reader.read(position, indices) for indices in sequences_of(*sizes, dp_rank, dp_size)]


class BatchReader:
    """Reads batches from a stream; sequence j of the global batch that starts at `position` is
    stream[position + j * length, position + (j + 1) * length).

    With `mask`, the stream of `sft_masks.open_mask`, only labels count that are answer.

    Errors: InputError, when opened, if the corpus was prepared for a larger vocabulary than
    `vocab_size`, and when reading, if a token id is outside of [0, vocab_size).
    """

    def __init__(
        self,
        stream: TokenStream,
        data_config: DataConfig,
        vocab_size: int,
        mask: TokenStream | None = None,
    ) -> None:
        self._stream = stream
        self._mask = mask
        self._length = data_config.sequence_length
        self._reset_positions = data_config.reset_position_ids
        self._reset_attention = data_config.reset_attention_mask
        self._vocab_size = vocab_size
        for corpus in stream.corpora:
            _check_manifest(corpus, vocab_size)

    def read(self, position: int, sequence_indices: Sequence[int]) -> Batch:
        """The given sequences of the global batch that starts at `position` of the stream."""
        rows = [self._read_row(position + j * self._length) for j in sequence_indices]
        boundaries = np.stack([row.boundaries for row in rows])
        return Batch(
            input_ids=torch.from_numpy(np.stack([row.inputs for row in rows])),
            labels=torch.from_numpy(np.stack([row.labels for row in rows])),
            position_ids=torch.from_numpy(self._position_ids(boundaries)),
            document_ids=torch.from_numpy(_document_ids(boundaries))
            if self._reset_attention
            else None,
        )

    def _read_row(self, position: int) -> Tokens:
        row = self._stream.read(position, self._length)
        wrong = _outside(row.inputs, self._vocab_size)
        # The next token of the file: here it is a label, and an input somewhere else.
        wrong_label = _outside(row.labels, self._vocab_size) & (row.labels != NO_LABEL)
        if np.any(wrong):
            self._refuse(position, int(np.argmax(wrong)), row.inputs, 0)
        if np.any(wrong_label):
            self._refuse(position, int(np.argmax(wrong_label)), row.labels, 1)
        if self._mask is not None:
            counted = self._mask.read(position, self._length).labels == 1
            row.labels[~counted] = NO_LABEL
        return row

    def _refuse(self, position: int, index: int, ids: np.ndarray, ahead: int) -> None:
        place = self._stream.locate(position + index)
        raise DataError(
            f"{self._stream.corpora[place.corpus].prefix}.bin: token id {ids[index]} at token "
            f"{place.offset + ahead} is outside of the model's vocabulary of {self._vocab_size}; "
            "prepare the corpus with the model's tokenizer, or set vocab_size"
        )

    def _position_ids(self, boundaries: np.ndarray) -> np.ndarray:
        """int64 [sequences, length] from bool [sequences, length]."""
        positions = np.broadcast_to(np.arange(self._length), boundaries.shape)
        if not self._reset_positions:
            return positions.copy()
        starts = np.where(boundaries, positions, 0)
        return positions - np.maximum.accumulate(starts, axis=1)


def _document_ids(boundaries: np.ndarray) -> np.ndarray:
    """int64 [sequences, length] from bool [sequences, length]; a sequence starts at 0."""
    counts = np.cumsum(boundaries, axis=1, dtype=np.int64)
    return counts - counts[:, :1]


def _outside(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    return (ids < 0) | (ids >= vocab_size)


def _check_manifest(corpus: IndexedCorpus, vocab_size: int) -> None:
    """Compare with the largest id that `megagrow prepare` noted; other corpora have no note."""
    manifest = CorpusManifest.beside(corpus.prefix)
    split = manifest.splits.get(corpus.prefix.name) if manifest else None
    if split is not None and split.max_token_id >= vocab_size:
        raise DataError(
            f"{corpus.prefix}: holds token ids up to {split.max_token_id}, more than the model's "
            f"vocab_size {vocab_size} allows; prepare it with the model's tokenizer, or set "
            "vocab_size"
        )
