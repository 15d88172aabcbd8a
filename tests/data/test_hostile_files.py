"""Corpora that somebody else has made, to do harm or by mistake."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from megagrow.data import sft
from megagrow.data.indexed import SPOT_CHECKS, IndexedCorpus, IndexedWriter
from megagrow.data.manifest import CorpusManifest
from megagrow.data.sources import records
from megagrow.data.sources.documents import RecordOptions, read_documents
from megagrow.data.sources.units import SourceUnit, find_sources
from megagrow.errors import InputError

SEQUENCES = 5 * SPOT_CHECKS
HEADER_BYTES = 34
UNCHECKED = 3
"""A document whose index no spot check looks at, see the test."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A corpus of which the spot checks see a part; one document per sequence of two tokens."""
    with IndexedWriter(tmp_path / "c", np.dtype("<u2")) as writer:
        for _ in range(SEQUENCES):
            writer.add_document(np.array([1, 2]))
        writer.finalize()
    return tmp_path / "c"


def change_document(prefix: Path, document: int, index: int) -> None:
    path = prefix.with_name(prefix.name + ".idx")
    raw = bytearray(path.read_bytes())
    struct.pack_into("<q", raw, HEADER_BYTES + 12 * SEQUENCES + 8 * document, index)
    path.write_bytes(raw)


@pytest.mark.parametrize("index", [2**40, -5, 2**63 - 1, -(2**63), SEQUENCES])
def test_document_indices_that_spot_checks_do_not_see(large: Path, index: int) -> None:
    change_document(large, UNCHECKED, index)
    corpus = IndexedCorpus(large)
    with pytest.raises(InputError, match=r"c\.idx: broken index: its document indices"):
        corpus.document_starts(0, corpus.num_tokens)


def test_a_bin_of_half_a_token_is_refused(tmp_path: Path, indexed_files) -> None:
    """Two sequences whose odd pointers fit to each other and to the file."""
    indexed_files(tmp_path / "c", [[1], [2]], [0, 1, 2])
    idx = tmp_path / "c.idx"
    raw = bytearray(idx.read_bytes())
    struct.pack_into("<q", raw, HEADER_BYTES + 8 + 8, 3)
    idx.write_bytes(raw)
    (tmp_path / "c.bin").write_bytes(bytes(5))
    with pytest.raises(InputError, match=r"c\.idx: broken index"):
        IndexedCorpus(tmp_path / "c")


def corpus_manifest(**changes: object) -> str:
    values = {
        "format": "megagrow corpus 1",
        "fingerprint": "",
        "sources": [],
        "tokenizer": "tokenizer.model",
        "tokenizer_checksum": "",
        "vocab_size": 50,
        "eos_id": 2,
        "splits": {},
        "files": {},
    }
    return json.dumps(values | changes)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "x\0y"])
def test_manifests_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    for changes in ({"files": {name: {"size": 1, "blake2b": "0" * 64}}}, {"tokenizer": name}):
        (tmp_path / "manifest.json").write_text(corpus_manifest(**changes))
        with pytest.raises(InputError, match="which is not in its folder"):
            CorpusManifest.read(tmp_path)


def of_splits(**changes: object) -> dict[str, object]:
    """Changes of a consistent manifest of 10 documents and 50 tokens of two bytes."""
    split = {"documents": 10, "tokens": 50, "max_token_id": 49} | changes
    files = {"train.bin": 100, "train.idx": 34 + 20 * 10 + 8}
    records = {name: {"size": size, "blake2b": "0" * 64} for name, size in files.items()}
    return {"splits": {"train": split}, "files": records}


def test_a_consistent_manifest_is_read(tmp_path: Path) -> None:
    for changes in (of_splits(), of_splits(documents=7) | {"sequence_length": 10}):
        (tmp_path / "manifest.json").write_text(corpus_manifest(**changes))
        found = CorpusManifest.describing(tmp_path / "train")
        assert found is not None and found.splits["train"].tokens == 50


ABSURD: list[tuple[dict[str, object], str]] = [
    *((of_splits(tokens=value), r"splits\.train") for value in (-1, 0, 49, 51, 10**30, "50", 50.0)),
    *((of_splits(documents=value), r"splits\.train") for value in (-1, 0, 9, 11, 2**63, True)),
    *((of_splits(max_token_id=value), "max_token_id") for value in (-1, -2, 50, 2**31)),
    *((of_splits(documents=value) | {"sequence_length": 5}, "documents") for value in (0, 11)),
    *(({"sequence_length": value}, "sequence_length") for value in (0, -5, 2**63, "1")),
    *(({"vocab_size": value}, "vocab_size") for value in (0, -1, 2**31 + 1, 1e9)),
    *(({"eos_id": value}, "eos_id") for value in (-1, 50, 2**40)),
    (of_splits(max_token_id=70_000) | {"vocab_size": 80_000}, "50 tokens are not 100 bytes"),
    ({"files": {"x": {"size": -1, "blake2b": "0" * 64}}}, r"files\.x: size must be"),
    ({"files": {"x": {"size": 2**63, "blake2b": "0" * 64}}}, r"files\.x"),
    ({"files": {"x": {"size": 1, "blake2b": "0" * 9}}}, r"files\.x: blake2b must be 64"),
    (of_splits() | {"files": {}}, r"files lacks train\.bin"),
]
"""Changes to a manifest, with the place that the message names."""


@pytest.mark.parametrize(("changes", "place"), ABSURD)
def test_absurd_numbers_of_a_manifest_are_refused(
    tmp_path: Path, changes: dict[str, object], place: str
) -> None:
    (tmp_path / "manifest.json").write_text(corpus_manifest(**changes))
    with pytest.raises(InputError, match=rf"manifest\.json: damaged \(.*{place}"):
        CorpusManifest.read(tmp_path)


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"manifest\.json: larger than the limit"):
        CorpusManifest.read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "format": 2}', "\x00", "[NaN]"])
def test_manifests_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        CorpusManifest.read(tmp_path)


def test_a_line_of_json_that_is_too_deep_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    unit = SourceUnit(
        "json lines", "", (str(path),), 0, path.stat().st_size, path.stat().st_size, ""
    )
    documents = read_documents(unit, RecordOptions())
    assert next(documents).text == "a"
    with pytest.raises(InputError, match=r"x\.jsonl: line 2: lists or objects are nested too deep"):
        next(documents)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.txt"])
def test_a_document_beyond_the_limit_is_not_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed line expands to 1000 times its bytes."""
    monkeypatch.setattr(records, "DOCUMENT_BYTES", 100_000)
    path = tmp_path / name
    line = json.dumps({"text": "a" * 10**7}).encode() + b"\n"
    path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    unit, *_ = find_sources([str(path)]).units
    with pytest.raises(InputError, match=rf"{name}: .*limit of 100000 bytes"):
        next(read_documents(unit, RecordOptions()))


def test_a_parquet_dictionary_cannot_multiply_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "DOCUMENT_BYTES", 100_000)
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 256}), path)
    assert path.stat().st_size < 5000
    (unit,) = find_sources([str(path)]).units
    with pytest.raises(InputError, match=r"x\.parquet: 256 rows contain 25\d+ bytes, too many"):
        next(read_documents(unit, RecordOptions()))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_instructions_beyond_the_limit_are_not_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "LIST_BYTES", 1000)
    (tmp_path / name).write_bytes(b"[" + b" " * 5000 + b"]")
    with pytest.raises(InputError, match=rf"{name}: .*limit of 1000 bytes"):
        next(sft.read_examples(tmp_path / name))
