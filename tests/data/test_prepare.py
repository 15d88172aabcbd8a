"""Preparing a corpus: the same bytes whatever the workers and interruptions, nothing lost."""

import errno
import io
import json
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from megagrow.data.indexed import IndexedCorpus, IndexedWriter
from megagrow.data.manifest import CorpusManifest, verify
from megagrow.data.prepare import prepare
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError


def _prepare(source, output, **options):
    given = {"tokenizer": "train", "vocab_size": 500, "validation_fraction": 0.1, "workers": 1}
    return prepare([str(source)], output, **{**given, **options}, console=_quiet())


def _quiet():
    return Console(file=io.StringIO())


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _documents(output, split):
    """The texts of a split, taken apart at the EOS tokens."""
    manifest = CorpusManifest.next_to(output / split)
    tokenizer = load_tokenizer(output / manifest.tokenizer)
    corpus = IndexedCorpus(output / split)
    starts = corpus.document_starts(0, corpus.num_tokens).tolist()
    ends = [*starts[1:], corpus.num_tokens]
    documents = [corpus.tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    assert all(ids[-1] == tokenizer.eos_id for ids in documents)
    assert all(tokenizer.eos_id not in ids[:-1] for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def test_all_documents_come_back_and_end_with_eos(source, texts, tmp_path):
    manifest = _prepare(source, tmp_path / "out")
    train, validation = (_documents(tmp_path / "out", split) for split in manifest.splits)
    assert Counter(train + validation) == Counter(texts)
    assert 10 < len(validation) < 60
    assert [text for text in texts if text in set(train)] == train
    for split, documents in (("train", train), ("validation", validation)):
        corpus = IndexedCorpus(tmp_path / "out" / split)
        noted = manifest.splits[split]
        assert noted.documents == len(documents) == corpus.num_documents
        assert noted.tokens == corpus.num_tokens
        assert noted.max_token_id == int(np.max(corpus.tokens[:])) < 500
    names = {"manifest.json", "tokenizer.model", "train.bin", "train.idx"}
    assert set(_bytes(tmp_path / "out")) == names | {"validation.bin", "validation.idx"}


def test_two_workers_give_the_same_bytes(source, tmp_path):
    _prepare(source, tmp_path / "one", workers=1)
    _prepare(source, tmp_path / "two", workers=2)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def test_a_complete_corpus_is_left_alone_until_something_changes(source, texts, tmp_path):
    out = tmp_path / "x[" / "b]\x1b[2J"
    first = _prepare(source, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    console = Console(file=io.StringIO(), width=500)
    options = {"vocab_size": 500, "validation_fraction": 0.1, "workers": 2}
    again = prepare([str(source)], out, "train", **options, console=console)
    assert again == first
    assert r"/x[/b]\x1b[2J: complete and unchanged" in console.file.getvalue()
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with source.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(InputError, match=r"already exists, prepared from other sources, .*--over"):
        _prepare(source, out)
    assert verify(out) == first
    changed = _prepare(source, out, overwrite=True)
    assert sum(split.documents for split in changed.splits.values()) == len(texts) + 1
    (out / "train.bin").unlink()
    assert _prepare(source, out) == changed == verify(out)


def test_the_split_goes_by_content_not_by_place(source, texts, tmp_path, model_path):
    options = {"tokenizer": str(model_path), "vocab_size": None}
    _prepare(source, tmp_path / "a", **options)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts[::-1], *texts]))
    _prepare(turned, tmp_path / "b", **options)
    held_out = set(_documents(tmp_path / "a", "validation"))
    assert set(_documents(tmp_path / "b", "validation")) == held_out
    assert not held_out & set(_documents(tmp_path / "b", "train"))
    _prepare(source, tmp_path / "c", **options, seed=-5)
    assert set(_documents(tmp_path / "c", "validation")) != held_out


def test_a_source_may_be_named_twice(source, texts, tmp_path, model_path):
    names = [str(source)] * 2
    prepare(names, tmp_path / "out", str(model_path), None, 0.1, 1, console=_quiet())
    both = _documents(tmp_path / "out", "train") + _documents(tmp_path / "out", "validation")
    assert Counter(both) == Counter([*texts, *texts])


def test_no_validation_when_none_is_asked_for(source, texts, tmp_path, model_path):
    options = {"tokenizer": str(model_path), "vocab_size": None}
    _prepare(source, tmp_path / "out", **options)
    manifest = _prepare(
        source, tmp_path / "out", **options, validation_fraction=0.0, overwrite=True
    )
    assert list(manifest.splits) == ["train"] and manifest.splits["train"].documents == len(texts)
    assert not (tmp_path / "out" / "validation.bin").exists()


def test_a_large_vocabulary_is_stored_in_32_bits(source, tmp_path, model_path, monkeypatch):
    options = {"tokenizer": str(model_path), "vocab_size": None}
    _prepare(source, tmp_path / "small", **options)
    for user in ("prepare", "part_files"):
        monkeypatch.setattr(f"megagrow.data.{user}.smallest_dtype", lambda _: np.dtype("<i4"))
    _prepare(source, tmp_path / "large", **options)
    small, large = (IndexedCorpus(tmp_path / name / "train") for name in ("small", "large"))
    assert (small.tokens.dtype, large.tokens.dtype) == (np.uint16, np.int32)
    np.testing.assert_array_equal(small.tokens[:], large.tokens[:])


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ("", {}, "no document with text"),
        ("\n\n", {}, "no document with text"),
        ('{"text": "only one"}\n', {}, "leaves none for validation"),
        ('{"text": "only one"}\n', {"validation_fraction": 0.999999}, "leaves none for train"),
        ('{"text": "x"}\n', {"validation_fraction": 1.0}, r"1\.0 is not in \[0, 1\)"),
        ('{"text": "x"}\n', {"workers": 0}, "workers = 0"),
        ('{"text": "x"}\n', {"vocab_size": 599}, "tokenizer has 600 tokens"),
        ('{"text": "x"}\n', {"text_key": "body"}, "line 1: no text under the key 'body'"),
    ],
)
def test_bad_input_is_refused(tmp_path, model_path, content, options, reason):
    source = tmp_path / "s.jsonl"
    source.write_text(content)
    given = {"tokenizer": str(model_path), "vocab_size": None, **options}
    with pytest.raises(InputError, match=reason) as caught:
        _prepare(source, tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_tokenizer_cannot_be_trained_on_nothing(tmp_path):
    (tmp_path / "s.jsonl").write_text("")
    with pytest.raises(InputError, match="no document with text"):
        _prepare(tmp_path / "s.jsonl", tmp_path / "out")


def test_an_output_within_a_source_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="is inside the source"):
        _prepare(tmp_path, tmp_path / "out")


def test_an_error_of_a_worker_process_is_one_line(source, tmp_path, model_path):
    with source.open("a") as file:
        file.write('{"text": 5}\n')
    options = {"tokenizer": str(model_path), "vocab_size": None}
    with pytest.raises(InputError, match=r"source\.jsonl: line 304: no text"):
        _prepare(source, tmp_path / "out", **options, workers=2)


def test_a_full_disk_is_named(source, tmp_path, model_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "finalize", full)
    with pytest.raises(InputError, match="out: No space left on device"):
        _prepare(source, tmp_path / "out", tokenizer=str(model_path), vocab_size=None)
    assert not list((tmp_path / "out").rglob("*.partial"))
