"""Corpora for the tests of this folder."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


class MemoryCorpus:
    """What a stream needs of an IndexedCorpus, without files."""

    def __init__(self, tokens: np.ndarray, starts: list[int], prefix: Path) -> None:
        self.tokens = tokens
        self.num_tokens = len(tokens)
        self.starts = np.array(sorted(starts), dtype=np.int64)
        self.prefix = prefix

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


@pytest.fixture(scope="session")
def memory_corpora() -> Callable[..., list[MemoryCorpus]]:
    """Corpora of the given sizes; token = 1000 * corpus + offset, so that a token tells where it
    comes from; documents of 7 tokens."""

    def make(sizes: list[int]) -> list[MemoryCorpus]:
        return [
            MemoryCorpus(1000 * i + np.arange(n), list(range(0, n, 7)), Path(f"/none/{i}"))
            for i, n in enumerate(sizes)
        ]

    return make


def write_indexed(
    prefix: Path,
    sequences: list[list[int]],
    documents: list[int],
    code: int = 8,
    letter: str = "H",
) -> None:
    """The format, written with struct alone: an independent witness."""
    size = struct.calcsize("<" + letter)
    tokens = [token for sequence in sequences for token in sequence]
    lengths = [len(sequence) for sequence in sequences]
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    prefix.with_name(prefix.name + ".bin").write_bytes(
        struct.pack(f"<{len(tokens)}{letter}", *tokens)
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


@pytest.fixture(scope="session")
def indexed_files() -> Callable[..., None]:
    """`write_indexed(prefix, sequences, document_indices, code, struct letter)`."""
    return write_indexed
