"""Corpora for the tests of this folder."""

import json
import struct
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.sources import units


class MemoryCorpus:
    """The part of IndexedCorpus that a stream needs, without files."""

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


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    """Real text: some of the standard library's modules, about 200 kB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ("abc", "ast", "bisect", "calendar", "csv", "dis", "enum", "heapq", "json/decoder")
    return [(root / f"{name}.py").read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def model_path(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 600 tokens, trained by megagrow."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(sample_texts, 600, path)
    return path


@pytest.fixture(scope="session")
def texts(sample_texts: list[str]) -> list[str]:
    """About 300 documents: paragraphs of code, and some hard ones."""
    paragraphs = [part for text in sample_texts for part in text.split("\n\n") if part]
    hard = ["caf\u00e9 \u4f60\u597d \U0001f680", "tab\t\r\n  end ", "</s>"]
    return paragraphs[:300] + hard


@pytest.fixture
def source(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The documents as JSON lines, in about twenty units."""
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(units, "SMALLEST_UNIT", path.stat().st_size // 20)
    monkeypatch.setattr(units, "UNITS", 1 << 40)
    return path


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 2000 bytes."""
    monkeypatch.setattr(units, "SMALLEST_UNIT", 2000)
    monkeypatch.setattr(units, "UNITS", 1 << 40)
