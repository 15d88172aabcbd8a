"""Document boundaries of a batch in the format of the attention kernels.

Built once per batch, on the CPU. A batch of B rows of S tokens is treated as T = B * S concatenated
tokens. Every token has a key; all tokens, or the last ones of each row, have a query. Attention
processes tiles of TILE tokens of one document; kernels with smaller blocks split a tile. All
document-dependent values are read from these lists, so kernels need no search, do no work on pairs
of documents, and handle an unpacked batch as one document per row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE = 128
"""Tokens per tile."""


@dataclass(frozen=True)
class Packing:
    """Document boundaries of a batch; all tensors int32 and on one device.

    Sizes differ from batch to batch. The tensors are marked dynamic, so torch.compile compiles
    once.
    """

    cu_seqlens: Tensor
    """Shape (N + 1,): the start of each of the N documents among the T tokens, followed by T."""
    query_tiles: Tensor
    """Shape (tiles, 3): first token of the tile, first token of its document, end of its document
    (exclusive), for each tile with a query. Sorted by number of visible keys, most first, so that
    the last programs to start are short. A window limits the number, and keeps the order.
    """
    key_tiles: Tensor
    """Shape (tiles, 3): all tiles, sorted by number of queries that see their keys, most first."""
    longest: int
    """Tokens of the longest document."""

    def __post_init__(self) -> None:
        for tensor in (self.cu_seqlens, self.query_tiles, self.key_tiles):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packing":
        """Return a copy on a device; non-blocking as torch.Tensor.to."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packing":
        """Return a copy in pinned memory."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Packing":
        names = ("cu_seqlens", "query_tiles", "key_tiles")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


def pack(
    document_ids: Tensor | None, batch: int, sequence: int, queries: int | None = None
) -> Packing:
    """Return the packing of a batch of `batch` rows of `sequence` tokens, on the CPU.

    document_ids (batch, sequence), integers on the CPU, separates the documents of a row: a
    document is a run of equal ids and ends with its row. With None, every row is one document.
    The last `queries` tokens of each row have queries, by default all. Raises ValueError for
    another shape, for an id that reappears later in its row, for 2^31 tokens or more, and for fewer
    than 1 or more than `sequence` queries.
    """
    queries = sequence if queries is None else queries
    if not 1 <= queries <= sequence:
        raise ValueError(f"{queries} queries per row of {sequence} keys; use 1 to {sequence}")
    if batch * sequence >= 2**31:
        raise ValueError(
            f"{batch} rows of {sequence} tokens exceed 32-bit indices; use fewer than 2^31 tokens"
        )
    starts = _starts(document_ids, batch, sequence)
    ends = torch.cat((starts[1:], starts.new_tensor([batch * sequence])))
    lengths = ends - starts
    tiles_of = (lengths + TILE - 1) // TILE
    document = torch.repeat_interleave(torch.arange(len(starts)), tiles_of)
    number = torch.arange(len(document)) - (tiles_of.cumsum(0) - tiles_of)[document]
    start, end = starts[document], ends[document]
    first = start + number * TILE
    tiles = torch.stack((first, start, end), 1).int()
    stop = torch.minimum(first + TILE, end)
    earliest = start // sequence * sequence + sequence - queries
    asking = stop > earliest
    keys_seen, queries_seeing = (stop - start)[asking], end - torch.maximum(first, earliest)
    return Packing(
        cu_seqlens=torch.cat((starts, ends[-1:])).int(),
        query_tiles=_sorted(tiles[asking], keys_seen),
        key_tiles=_sorted(tiles, queries_seeing.clamp(min=0)),
        longest=int(lengths.max()),
    )


def _starts(document_ids: Tensor | None, batch: int, sequence: int) -> Tensor:
    """Return the starts of all documents among the concatenated tokens: (N,) int64."""
    if document_ids is None:
        return torch.arange(batch) * sequence
    if document_ids.shape != (batch, sequence):
        shape = tuple(document_ids.shape)
        raise ValueError(f"document_ids has shape {shape}, expected ({batch}, {sequence})")
    starts = document_starts(document_ids).flatten().nonzero()[:, 0]
    row_ids = torch.stack((starts // sequence, document_ids.flatten()[starts].long()), 1)
    if len(row_ids.unique(dim=0)) < len(starts):
        raise ValueError("a document id reappears after another one in the same row")
    return starts


def _sorted(tiles: Tensor, work: Tensor) -> Tensor:
    """Return the tiles with most work first; two of them at least, of which one may be empty.

    torch.compile treats a size of 1 as static.
    """
    tiles = tiles[work.argsort(descending=True, stable=True)]
    return torch.cat((tiles, torch.zeros_like(tiles))) if len(tiles) == 1 else tiles


def document_starts(document_ids: Tensor) -> Tensor:
    """Return (B, S) bool, True at the first token of each run of equal ids of a row (B, S)."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def no_starts(x: Tensor) -> Tensor:
    """Return the document starts (B, S) of x (B, S, C) if every row is one document: all False."""
    return x.new_zeros(x.shape[:2], dtype=torch.bool)
