"""Batches of packed documents for tests, given as the lengths of the documents of each row."""

import torch

Rows = tuple[tuple[int, ...], ...]


def ids_of(rows: Rows) -> torch.Tensor:
    """Document ids (B, S), int64."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])


def ranges_of(rows: Rows) -> list[tuple[int, slice]]:
    """(row, tokens in it) of every document."""
    found = []
    for index, lengths in enumerate(rows):
        at = 0
        for length in lengths:
            found.append((index, slice(at, at + length)))
            at += length
    return found
