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
from megagrow.data.part_files import Options
from megagrow.data.prepare import prepare
from megagrow.data.sources import units
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
    manifest = CorpusManifest.read(output)
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
    monkeypatch.setattr("megagrow.data.part_files.smallest_dtype", lambda _: np.dtype("<i4"))
    _prepare(source, tmp_path / "large", **options)
    small, large = (IndexedCorpus(tmp_path / name / "train") for name in ("small", "large"))
    assert (small.tokens.dtype, large.tokens.dtype) == (np.uint16, np.int32)
    np.testing.assert_array_equal(small.tokens[:], large.tokens[:])


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ("", {}, "no document with text"),
        ("\n\n", {}, "no document with text"),
        ('{"text": ""}\n{"text": null}\n', {"skip_invalid": True}, "1 empty, 1 null text"),
        ('{"text": "x"}\n', {"filters": ["id=1"]}, "line 1: no key 'id', its keys are 'text'"),
        ('{"text": "x"}\n', {"filters": ["id"]}, "--filter id: not of the form"),
        ('{"text": "x"}\n', {"include": ["*"]}, "no source is a folder"),
        ('{"text": "x"}\n', {"validation_fraction": 1.0}, r"1\.0 is not in \[0, 1\)"),
        ('{"text": "x"}\n', {"workers": 0}, "workers = 0"),
        ('{"text": "x"}\n', {"vocab_size": 599}, "tokenizer has 600 tokens"),
        ('{"text": "x"}\n', {"text_key": "body"}, "line 1: no key 'body', its keys are 'text'"),
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


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.3, 0.999999])
@pytest.mark.parametrize("count", [1, 7])
def test_too_few_documents_are_divided_by_tokens(
    tmp_path, sample_texts, model_path, fraction, count, monkeypatch
):
    """Train and validation are the tokens of the documents, cut at the wanted fraction."""
    monkeypatch.setattr(
        Options, "split_of", lambda self, text: "train" if count == 1 else "validation"
    )
    (tmp_path / "in").mkdir()
    for number in range(count):
        (tmp_path / "in" / f"{number}.txt").write_text(sample_texts[number])
    options = {"tokenizer": str(model_path), "vocab_size": None, "validation_fraction": fraction}
    monkeypatch.setattr(units, "SMALLEST_UNIT", 20_000)
    console = Console(file=io.StringIO(), width=500)
    manifest = prepare(
        [str(tmp_path / "in")], tmp_path / "out", console=console, workers=1, **options
    )
    assert "the last tokens are the validation" in console.file.getvalue()
    train, validation = (IndexedCorpus(tmp_path / "out" / split) for split in manifest.splits)
    tokenizer = load_tokenizer(model_path)
    encoded = tokenizer.encode_batch(sample_texts[:count])
    expected = [token for ids in encoded for token in [*ids, tokenizer.eos_id]]
    assert [*train.tokens[:].tolist(), *validation.tokens[:].tolist()] == expected
    wanted = min(max(round(fraction * len(expected)), 1), len(expected) - 1)
    assert validation.num_tokens == wanted
    starts = np.cumsum([0, *(len(ids) + 1 for ids in encoded[:-1])])
    cut = len(expected) - wanted
    assert train.document_starts(0, cut).tolist() == starts[starts < cut].tolist()
    found = validation.document_starts(0, wanted) + cut
    assert found.tolist() == sorted({cut, *starts[starts >= cut].tolist()})
    for name, corpus in (("train", train), ("validation", validation)):
        assert manifest.splits[name].documents == corpus.num_documents
        assert manifest.splits[name].max_token_id == max(corpus.tokens[:])
    assert verify(tmp_path / "out") == manifest


def test_options_of_the_sources_are_part_of_the_corpus(tmp_path, model_path):
    """Another filter gives another corpus; what is left out is counted and recorded."""
    (tmp_path / "in").mkdir()
    records = [{"text": f"document {n}", "kind": "ab"[n % 2]} for n in range(40)]
    records += [{"text": None, "kind": "b"}, {"kind": "b"}, {"text": "", "kind": "b"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "in" / "a.jsonl").write_text(lines + "{\n")
    (tmp_path / "in" / "b[red].jsonl").write_text(lines)
    (tmp_path / "in" / "README.md").write_text("# not data")
    options = {"tokenizer": str(model_path), "vocab_size": None, "validation_fraction": 0}
    console = Console(file=io.StringIO(), width=500)
    chosen = {"filters": ["kind!=a"], "skip_invalid": True}
    manifest = prepare(
        [str(tmp_path / "in")], tmp_path / "out", console=console, **options, **chosen
    )
    assert manifest.skipped == {
        "empty": 2,
        "filtered": 40,
        "no key 'text'": 2,
        "not JSON": 1,
        "null text": 2,
    }
    shown = console.file.getvalue()
    assert "skipped documents: 2 empty, 40 filtered, 2 no key 'text', 1 not JSON, 2 null" in shown
    assert "skipped 1: not data, in a folder with data files" in shown and "README.md" in shown
    assert manifest.splits["train"].documents == 40 and manifest == verify(tmp_path / "out")
    for other in ({**chosen, "filters": ["kind!=c"]}, {**chosen, "exclude": ["a.jsonl"]}):
        with pytest.raises(
            InputError, match="already exists, prepared from other sources, options"
        ):
            _prepare(tmp_path / "in", tmp_path / "out", **options, **other)


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
    with pytest.raises(InputError, match=r"source\.jsonl: line 304: the value under 'text'"):
        _prepare(source, tmp_path / "out", **options, workers=2)


def test_a_full_disk_is_named(source, tmp_path, model_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "finalize", full)
    with pytest.raises(InputError, match="out: No space left on device"):
        _prepare(source, tmp_path / "out", tokenizer=str(model_path), vocab_size=None)
    assert not list((tmp_path / "out").rglob("*.partial"))
