"""The documents of a batch, as attention kernels want them told: made once per batch, on the CPU.

A batch of B rows of S tokens is taken as T = B * S tokens laid end to end. Attention works on them
in tiles, TILE tokens of one document; kernels with smaller blocks split a tile. Whatever depends on
the documents is looked up in these lists, so kernels need no search, no work is spent on pairs of
documents, and a plain batch is simply one document per row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE = 128
"""Tokens in a tile of the lists."""


@dataclass(frozen=True)
class Packing:
    """Where the documents of a batch are; all tensors int32 and on one device.

    Their sizes differ from batch to batch, and torch.compile is told so: it compiles once.
    """

    cu_seqlens: Tensor
    """(N + 1,): where each of N documents starts among the T tokens, and at last T."""
    query_tiles: Tensor
    """(tiles, 3): first token of a tile, first token of its document, and the token after its
    document; those whose queries see most keys first, so that the last to start are short."""
    key_tiles: Tensor
    """(tiles, 3): the same tiles, those whose keys are seen by most queries first."""
    longest: int
    """Tokens of the longest document."""

    def __post_init__(self) -> None:
        for tensor in (self.cu_seqlens, self.query_tiles, self.key_tiles):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def to(self, device: torch.device | str) -> "Packing":
        """The same on a device."""
        moved = (
            x.to(device, non_blocking=True)
            for x in (self.cu_seqlens, self.query_tiles, self.key_tiles)
        )
        cu_seqlens, query_tiles, key_tiles = moved
        return replace(self, cu_seqlens=cu_seqlens, query_tiles=query_tiles, key_tiles=key_tiles)


def pack(document_ids: Tensor | None, batch: int, sequence: int) -> Packing:
    """The packing of a batch of `batch` rows of `sequence` tokens each, on the CPU.

    document_ids (batch, sequence), integers on the CPU, tells tokens of one row apart: a document
    is a run of equal ids, and ends with its row. None: every row is one document. Raises ValueError
    for another shape, for an id that comes back later in its row, and for 2^31 tokens or more.
    """
    if batch * sequence >= 2**31:
        raise ValueError(f"{batch} rows of {sequence} tokens are too many for 32-bit indices")
    starts = _starts(document_ids, batch, sequence)
    ends = torch.cat((starts[1:], starts.new_tensor([batch * sequence])))
    lengths = ends - starts
    tiles_of = (lengths + TILE - 1) // TILE
    document = torch.repeat_interleave(torch.arange(len(starts)), tiles_of)
    number = torch.arange(len(document)) - (tiles_of.cumsum(0) - tiles_of)[document]
    start, end = starts[document], ends[document]
    first = start + number * TILE
    tiles = torch.stack((first, start, end), 1).int()
    keys_seen = torch.minimum(first + TILE, end) - start
    return Packing(
        cu_seqlens=torch.cat((starts, ends[-1:])).int(),
        query_tiles=_two(tiles[keys_seen.argsort(descending=True, stable=True)]),
        key_tiles=_two(tiles[(end - first).argsort(descending=True, stable=True)]),
        longest=int(lengths.max()),
    )


def _starts(document_ids: Tensor | None, batch: int, sequence: int) -> Tensor:
    """(N,) int64: where documents start among the tokens laid end to end."""
    if document_ids is None:
        return torch.arange(batch) * sequence
    if document_ids.shape != (batch, sequence):
        shape = tuple(document_ids.shape)
        raise ValueError(f"document_ids has the shape {shape}, the batch ({batch}, {sequence})")
    begins = torch.ones(batch, sequence, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    named = torch.stack((starts // sequence, document_ids.flatten()[starts].long()), 1)
    if len(named.unique(dim=0)) < len(starts):
        raise ValueError("a document id comes back after another one in the same row")
    return starts


def _two(tiles: Tensor) -> Tensor:
    """The tiles; a single one with an empty one, as torch.compile takes a size of 1 as fixed."""
    return torch.cat((tiles, torch.zeros_like(tiles))) if len(tiles) == 1 else tiles
