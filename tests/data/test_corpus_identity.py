"""A corpus keeps its identity when moved or copied, and loses it with any change of its content."""

import json
import os
import shutil

import numpy as np
import pytest

from megagrow.data import corpus_identity as module
from megagrow.data.corpus_identity import corpus_identity
from megagrow.data.indexed import IndexedWriter
from megagrow.errors import InputError
from tests.helpers.alpaca import prepare

TOKENS = 300


def write(prefix, change=(), lengths=(100, 200)):
    """A foreign corpus of 600 bytes: no manifest."""
    tokens = np.arange(TOKENS)
    tokens[list(change)] = 7
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        for part in np.split(tokens, np.cumsum(lengths)[:-1]):
            writer.add_document(part)
        writer.finalize()
    return corpus_identity(prefix)


def test_a_foreign_corpus_is_identified_by_sizes_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(module, "BLOCKS", 3)
    first = write(tmp_path / "a" / "train")
    assert first.tokenizer is None and first.content.startswith("sampled:")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "train.bin").rename(tmp_path / "b" / "other.bin")
    (tmp_path / "b" / "train.idx").rename(tmp_path / "b" / "other.idx")
    os.utime(tmp_path / "b" / "other.bin", (1, 1))
    assert corpus_identity(tmp_path / "b" / "other") == first
    for place in (0, TOKENS // 2, TOKENS - 1):
        assert write(tmp_path / "c" / "train", [place]) != first
    assert write(tmp_path / "c" / "train", lengths=(300,)) != first
    assert write(tmp_path / "c" / "train", lengths=(101, 199)) != first
    # Between the samples; documented.
    assert write(tmp_path / "c" / "train", [TOKENS // 4]) == first
    (tmp_path / "c" / "train.bin").unlink()
    with pytest.raises(InputError, match=r"train\.bin: No such file"):
        corpus_identity(tmp_path / "c" / "train")


def test_a_prepared_corpus_is_identified_by_its_recorded_checksums(tmp_path):
    manifest, _ = prepare(tmp_path, 30, 160, validation_fraction=0.3)
    first = corpus_identity(tmp_path / "corpus" / "train")
    assert first.tokenizer.checksum == manifest.tokenizer_checksum
    assert corpus_identity(tmp_path / "corpus" / "validation").content != first.content
    (tmp_path / "corpus").rename(tmp_path / "moved")
    assert corpus_identity(tmp_path / "moved" / "train") == first
    path = tmp_path / "moved" / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("train.bin", "train.idx", "train.mask.bin", "train.mask.idx"):
        changed = json.loads(path.read_text())
        changed["files"][name]["blake2b"] = "0" * 64
        path.write_text(json.dumps(changed))
        assert corpus_identity(tmp_path / "moved" / "train") != first
        path.write_text(json.dumps(content))
    assert corpus_identity(tmp_path / "moved" / "train") == first
    with (tmp_path / "moved" / "train.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(InputError, match=r"train\.bin: \d+ bytes, its manifest records"):
        corpus_identity(tmp_path / "moved" / "train")
