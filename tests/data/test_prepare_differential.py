"""`prepare` on generated folders against a plain reading by json, pyarrow and the tokenizers."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers
from backports import zstd
from rich.console import Console

from megagrow.data import document_encoding
from megagrow.data.indexed import IndexedCorpus
from megagrow.data.prepare import prepare
from megagrow.data.sources import records, units

COMPRESSORS = {
    "": (bytes, bytes),
    ".gz": (gzip.compress, gzip.decompress),
    ".zst": (zstd.compress, zstd.decompress),
    ".bz2": (bz2.compress, bz2.decompress),
    ".xz": (lzma.compress, lzma.decompress),
}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
NAMES = ("a", "B b", "[red]x", "\u00e9\u4f60", "new\nline", os.fsdecode(b"\xff\xfe"), "q.r", "*")
FOLDERS = ("sub", "Sub folder", "z[a-z]", ".hidden")


def _texts(random_: random.Random, sample: str) -> list[str]:
    texts = ["", " ", "caf\u00e9 \u4f60\u597d \U0001f680\u2028\u0085x", "</s>", "\ufefftext", "\0"]
    for _ in range(random_.randrange(1, 12)):
        start, length = random_.randrange(len(sample)), random_.choice([3, 80, 700, 5000])
        texts.append(sample[start : start + length])
    return random_.choices(texts, k=random_.randrange(1, 12))


def _write(random_: random.Random, path: Path, suffix: str, texts: list[str]) -> None:
    """Write the texts as the documents of a file, in a random one of the ways that are accepted."""
    rows = [{"id": n, "meta": {"kind": "ab"[n % 2]}, "text": text} for n, text in enumerate(texts)]
    if suffix == ".parquet":
        with path.open("wb") as file:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3)
        return
    is_ascii, indent = random_.random() < 0.5, random_.choice([None, 1])
    if suffix == ".txt":
        content = texts[0].replace("\0", "") or "x"
    elif suffix == ".json" and random_.random() < 0.6:
        content = json.dumps(rows if indent else rows[0], indent=indent, ensure_ascii=is_ascii)
    else:
        end = random_.choice(["\n", "\r\n", "\n\n \n"])
        content = end.join(json.dumps(row, ensure_ascii=is_ascii) for row in rows)
        content += random_.choice(["", end])
    raw = random_.choice([b"", b"\xef\xbb\xbf"]) + content.encode()
    ending = random_.choice(list(COMPRESSORS))
    compress = COMPRESSORS[ending][0]
    if ending and random_.random() < 0.5:  # two members, cut anywhere, and zero padding
        cut = random_.randrange(len(raw) + 1)
        raw = compress(raw[:cut]) + compress(raw[cut:])
        raw += b"" if ending == ".zst" else bytes(random_.choice([0, 512]))
    else:
        raw = compress(raw)
    name = path.name + (ending.upper() if random_.random() < 0.3 else ending)
    path.with_name(name).write_bytes(raw)


def _generate(random_: random.Random, folder: Path, sample: str, depth: int = 0) -> None:
    """Write a random tree of files, links and things to skip."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in random_.sample(NAMES, random_.randrange(2, 5)):
        suffix = random_.choice(SUFFIXES)
        shown = suffix.upper() if random_.random() < 0.3 else suffix
        _write(random_, folder / (name + shown), suffix, _texts(random_, sample))
    for name in random_.sample(FOLDERS, 2 if depth < 2 else 0):
        _generate(random_, folder / name, sample, depth + 1)
    for name in ("README.md", "license", "meta.json", "x.bin"):
        if random_.random() < 0.5:
            content = {"meta.json": b'{"a": "b"}', "x.bin": b"a\0"}.get(name, b"# not data")
            (folder / name).write_bytes(content)
    others = [path for path in folder.parent.iterdir() if path.name[0] != "."]
    for number, target in enumerate([*random_.sample(others, 1), folder, Path("missing")]):
        if random_.random() < 0.5:
            (folder / f"link {number}{''.join(target.suffixes[-2:])}").symlink_to(target)


def _files(folder: Path, without: str, seen: set[object]) -> Iterator[Path]:
    """Yield the files below a folder in order, each once, without names of this kind."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        identity = path.resolve() if path.exists() else None
        if name.startswith(".") or without in name.lower() or identity in (None, *seen):
            continue
        seen.add(identity)
        if path.is_dir():
            yield from _files(path, without, seen)
        else:
            yield path


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, none if it is not data."""
    name = path.name.lower()
    ending = next((end for end in COMPRESSORS if end and name.endswith(end)), "")
    suffix = Path(name.removesuffix(ending)).suffix
    if suffix not in SUFFIXES or name == "meta.json":
        return []
    if suffix == ".parquet":
        return pyarrow.parquet.read_table(io.BytesIO(path.read_bytes())).to_pylist()
    raw = path.read_bytes()
    raw = raw.rstrip(b"\0") if ending == ".xz" else raw
    text = COMPRESSORS[ending][1](raw).decode("utf-8-sig")
    if suffix == ".txt":
        return [{"text": text}]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return value if isinstance(value, list) else [value]


def _library(path: Path):
    """Return the encoding function and the EOS id of the library of a tokenizer."""
    if path.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return model.encode, model.eos_id()
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, 0


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory, sample_texts):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts[:3], trainer)
    tokenizer.enable_truncation(10)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("seed", range(8))
def test_documents_and_tokens_are_those_of_a_plain_reading(
    tmp_path, sample_texts, model_path, tokenizer_json, monkeypatch, seed
):
    random_ = random.Random(seed)
    source = tmp_path / "in"
    _generate(random_, source, sample_texts[1])
    (source / "one.jsonl").write_text('{"text": "at least one", "meta": {"kind": "a"}}')
    for module, name, value in [
        (units, "SMALLEST_UNIT", random_.choice([2000, 1 << 20])),
        (units, "UNITS", 1 << 40),
        (records, "CHUNK", random_.choice([50, 1 << 20])),
        (document_encoding, "LONG", random_.choice([600, 1 << 18])),
        (document_encoding, "WINDOW", 400),
        (document_encoding, "OVERLAP", 100),
    ]:
        monkeypatch.setattr(module, name, value)
    filtered = random_.random() < 0.5
    options = {"filters": ["meta.kind!=b"], "exclude": ["*.[tT][xX][tT]*"]} if filtered else {}
    files = _files(source, ".txt" if filtered else "\0", {source.resolve()})
    rows = [row for file in files for row in _rows(file)]
    texts = [row["text"] for row in rows if not filtered or row["meta"]["kind"] == "a"]
    path = (model_path, tokenizer_json)[seed % 2]
    encode, eos = _library(path)
    expected = [np.array([*encode(text), eos]) for text in texts if text]
    console = Console(file=io.StringIO())
    manifest = prepare(
        [str(source)], tmp_path / "out", str(path), None, 0, 1, console=console, **options
    )
    corpus = IndexedCorpus(tmp_path / "out" / "train")
    assert manifest.splits["train"].documents == len(expected)
    np.testing.assert_array_equal(corpus.tokens[:], np.concatenate(expected))
    starts = np.cumsum([0, *map(len, expected[:-1])])
    np.testing.assert_array_equal(corpus.document_starts(0, corpus.num_tokens), starts)
