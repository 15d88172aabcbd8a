"""Batches of packed documents, specified by the document lengths of each row."""

import torch

Rows = tuple[tuple[int, ...], ...]


def ids_of(rows: Rows) -> torch.Tensor:
    """Return document ids (B, S), int64."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])


def ranges_of(rows: Rows) -> list[tuple[int, slice]]:
    """Return (row, token range) of every document."""
    actual = []
    for index, lengths in enumerate(rows):
        at = 0
        for length in lengths:
            actual.append((index, slice(at, at + length)))
            at += length
    return actual
