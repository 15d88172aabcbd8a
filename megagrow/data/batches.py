"""Batches: the sequences of the stream that one rank reads for one micro-batch."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from megagrow.config.schema import BatchConfig, CorpusConfig, StageDataConfig
from megagrow.data.indexed import IndexedCorpus
from megagrow.data.manifest import CorpusManifest
from megagrow.data.stream import NO_LABEL, Tokens, TokenStream
from megagrow.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """Sequences of the stream as int64 CPU tensors."""

    input_ids: torch.Tensor
    """[sequences, length]"""
    labels: torch.Tensor
    """Next tokens, [sequences, length]; -100 where the loss ignores the position."""
    position_ids: torch.Tensor
    """[sequences, length]; restarts from 0 at each boundary if `reset_position_ids` is set."""
    document_ids: torch.Tensor | None
    """Index of each token's document within its sequence, [sequences, length]; attention is limited
    to the token's document. None if `reset_attention_mask` is not set. Of full sequences in any
    case."""
    documents: Any = None
    """`document_ids` in the format of the attention backend; None before `packed`."""

    def packed(self, pack: Callable[[torch.Tensor], Any]) -> "Batch":
        """Return the batch with `documents`, the result of `pack` for its `document_ids`."""
        if self.document_ids is None or self.documents is not None:
            return self
        return replace(self, documents=pack(self.document_ids))

    def sharded(self, shard: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with the part of the positions that `shard` selects.

        Documents are those of the full sequences.
        """
        names = ("input_ids", "labels", "position_ids")
        return replace(self, **{name: shard(getattr(self, name)) for name in names})

    def pin_memory(self) -> "Batch":
        """Return the batch with the model's inputs in pinned memory, for non-blocking copies."""
        names = ("input_ids", "labels", "position_ids", "documents")
        inputs = {name: getattr(self, name) for name in names}
        return replace(self, **{k: x.pin_memory() for k, x in inputs.items() if x is not None})


def open_stream(
    corpora: Sequence[CorpusConfig],
    seed: int,
    block_size: int,
    shuffle: bool = True,
    keys: Sequence[int] | None = None,
) -> TokenStream:
    """Open and blend corpora, see `TokenStream`. Raises DataError if one of them is damaged."""
    opened = [open_corpus(corpus.path) for corpus in corpora]
    weights = [corpus.weight for corpus in corpora]
    return TokenStream(opened, weights, seed, block_size, shuffle, keys)


def open_corpus(prefix: Path) -> IndexedCorpus:
    """Open a corpus. Raises DataError if it is damaged or is not the one its manifest describes."""
    corpus, manifest = IndexedCorpus(prefix), CorpusManifest.describing(prefix)
    split = manifest.splits[prefix.name] if manifest else None
    if split is not None and split.tokens != corpus.num_tokens:
        raise DataError(
            f"{prefix}.bin: {corpus.num_tokens} tokens, its manifest.json records {split.tokens}; "
            "copy both again, or prepare the corpus again"
        )
    return corpus


def sequences_of(
    global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Return, for each micro-batch, the indices of the global batch's sequences this rank reads.

    Over all ranks and micro-batches each sequence occurs exactly once, so the global batch does
    not depend on the layout.
    """
    per_step = micro_batch_size * dp_size
    if global_batch_size % per_step:
        raise ConfigError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
            f"{micro_batch_size} x data parallel {dp_size}"
        )
    first = dp_rank * micro_batch_size
    starts = range(first, global_batch_size, per_step)
    return [list(range(start, start + micro_batch_size)) for start in starts]


Position = TypeVar("Position", contravariant=True)


class Reader(Protocol[Position]):
    """Reader of the sequences of global batches."""

    def read(self, position: Position, sequence_indices: Sequence[int], /) -> Batch:
        """Read the given sequences of the global batch at a position."""


def read_micro_batches(
    reader: Reader[Position],
    position: Position,
    batch: BatchConfig,
    dp_rank: int,
    dp_size: int,
) -> list["Batch"]:
    """Read this rank's micro-batches of the global batch that starts at a position.

    Raises:
        DataError: the stream cannot be read.
    """
    sizes = batch.global_batch_size, batch.micro_batch_size
    return [reader.read(position, indices) for indices in sequences_of(*sizes, dp_rank, dp_size)]


class BatchReader:
    """Reader of batches from a stream.

    Sequence j of the global batch that starts at `position` is
    stream[position + j * length, position + (j + 1) * length). With `mask`, the stream returned by
    `sft.open_mask`, only answer tokens contribute to the loss.

    Raises DataError on construction if the corpus was prepared for a larger vocabulary than
    `vocab_size`, and on reading if a token id is outside [0, vocab_size).
    """

    def __init__(
        self,
        stream: TokenStream,
        data_config: StageDataConfig,
        vocab_size: int,
        mask: TokenStream | None = None,
    ) -> None:
        self.stream = stream
        self._mask = mask
        self.length = data_config.sequence_length
        """Tokens of a sequence."""
        self._reset_positions = data_config.reset_position_ids
        self._reset_attention = data_config.reset_attention_mask
        self._vocab_size = vocab_size
        for corpus in stream.corpora:
            _check_manifest(corpus, vocab_size)

    def on(self, stream: TokenStream) -> "BatchReader":
        """Return a reader of another stream of the same corpora; instruction data has one only."""
        changed = copy.copy(self)
        changed.stream = stream
        return changed

    def read(self, position: int, sequence_indices: Sequence[int]) -> Batch:
        """Read the given sequences of the global batch that starts at `position`."""
        rows = [self._read_row(position + j * self.length) for j in sequence_indices]
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
        row = self.stream.read(position, self.length)
        bad_inputs = _outside(row.inputs, self._vocab_size)
        # A label is the next token of the file, which is an input of another sequence.
        bad_labels = _outside(row.labels, self._vocab_size) & (row.labels != NO_LABEL)
        if np.any(bad_inputs):
            self._raise_bad_id(position, int(np.argmax(bad_inputs)), row.inputs, 0)
        if np.any(bad_labels):
            self._raise_bad_id(position, int(np.argmax(bad_labels)), row.labels, 1)
        if self._mask is not None:
            counted = self._mask.read(position, self.length).labels == 1
            row.labels[~counted] = NO_LABEL
        return row

    def _raise_bad_id(self, position: int, index: int, ids: np.ndarray, ahead: int) -> None:
        location = self.stream.locate(position + index)
        raise DataError(
            f"{self.stream.corpora[location.corpus].prefix}.bin: token id {ids[index]} at token "
            f"{location.offset + ahead} is outside the model's vocabulary of {self._vocab_size}; "
            "prepare the corpus with the model's tokenizer, or set vocab_size"
        )

    def _position_ids(self, boundaries: np.ndarray) -> np.ndarray:
        """Return position ids, int64 [sequences, length], from bool [sequences, length]."""
        positions = np.broadcast_to(np.arange(self.length), boundaries.shape)
        if not self._reset_positions:
            return positions.copy()
        starts = np.where(boundaries, positions, 0)
        return positions - np.maximum.accumulate(starts, axis=1)


def _document_ids(boundaries: np.ndarray) -> np.ndarray:
    """Return document ids, int64 [sequences, length], starting at 0 in each sequence."""
    counts = np.cumsum(boundaries, axis=1, dtype=np.int64)
    return counts - counts[:, :1]


def _outside(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    return (ids < 0) | (ids >= vocab_size)


def _check_manifest(corpus: IndexedCorpus, vocab_size: int) -> None:
    """Check the largest token id in the manifest; corpora of other programs have no manifest."""
    manifest = CorpusManifest.describing(corpus.prefix)
    split = manifest.splits[corpus.prefix.name] if manifest else None
    if split is not None and split.max_token_id >= vocab_size:
        raise DataError(
            f"{corpus.prefix}: contains token ids up to {split.max_token_id}, but the model's "
            f"vocab_size is {vocab_size}; prepare it with the model's tokenizer, or set vocab_size"
        )
