"""Records and their texts: invalid ones are named or counted, filters select them."""

import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from megagrow.data.sources import records
from megagrow.data.sources.documents import Filter
from megagrow.errors import InputError
from tests.helpers.sources import TEXTS, json_lines, read_texts, refusal_of


def test_json_lists_are_read_in_chunks(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    values = [{"text": text, "n": [1.5e300, -12, {"a": None}], "b": True} for text in TEXTS[:40]]
    for chunk in (1, 2, 7, 100, 5000):
        monkeypatch.setattr(records, "CHUNK", chunk)
        for indent in (None, 2):
            path.write_text(json.dumps(values, indent=indent))
            assert read_texts([path]) == TEXTS[:40]
        path.write_text("[]")
        assert read_texts([path]) == []
    for content, reason in [
        (json.dumps(values)[:-1], "']' expected"),
        (json.dumps(values) + "x", "text after the end of the list"),
        (json.dumps(values).replace("}, {", "} {"), "']' expected"),
        (json.dumps(values[:1])[:-1] + ",]", "Expecting value"),
        (json.dumps(values).replace(": true", ": yes", 1), "after record 0: Expecting value"),
        ("[" * 100_000, "nested too deeply"),
    ]:
        path.write_text(content)
        assert f"{path}: " in refusal_of([path]) and reason in refusal_of([path])


BAD_LINES = {
    b'{"body": "x", "id": 1}': "no key 'text', its keys are 'body', 'id'; correct --text-key",
    b'{"text": null}': "the text under 'text' is null",
    b'{"text": 5}': "the value under 'text' is of type int, not a string",
    b'["text"]': "not a JSON object",
    b'{"text": "x"': "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_lines_are_named_by_number(tmp_path, small_units, line, suffix):
    path = tmp_path / f"bad.jsonl{suffix}"
    content = json_lines(TEXTS[:100]) + b"\n" + line + b"\n" + json_lines(TEXTS[:5])
    path.write_bytes(gzip.compress(content) if suffix else content)
    message = refusal_of([path])
    assert f"{path}: line 102: " in message and BAD_LINES[line] in message
    assert message.endswith("pass --skip-invalid to leave out such records")
    skipped = Counter()
    assert read_texts([path], skipped=skipped, skip_invalid=True) == TEXTS[:100] + TEXTS[:5]
    assert sum(skipped.values()) == 1


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"good \xff")
    assert f"{tmp_path}/bad.txt: not UTF-8 at byte 5" in refusal_of([tmp_path])
    skipped = Counter()
    assert read_texts([tmp_path], skipped=skipped, skip_invalid=True) == ["good"]
    assert skipped == {"not UTF-8": 1}


def test_a_parquet_string_that_is_not_utf8_is_named(tmp_path):
    values = [b"good", b"bad \xff", None, b"", b"fine"]
    for kind in (pyarrow.string(), pyarrow.large_string()):
        array = pyarrow.array(values, pyarrow.binary()).cast(pyarrow.large_binary())
        if kind == pyarrow.string():
            array = array.cast(pyarrow.binary())
        table = pyarrow.table({"text": array.view(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        message = refusal_of([tmp_path / "a.parquet"])
        assert (
            f"{tmp_path}/a.parquet: row 2: not UTF-8 at byte 4 of a string; pass --skip" in message
        )
        skipped = Counter()
        read = read_texts([tmp_path / "a.parquet"], skipped=skipped, skip_invalid=True)
        assert read == ["good", "fine"]
        assert skipped == {"not UTF-8": 1, "null text": 1, "empty": 1}


RECORDS = [
    {"text": "0", "meta": {"set": "ArXiv", "n": 1}, "a.b": "x"},
    {"text": "1", "meta": {"set": "GitHub", "n": 2.0}, "a.b": "y"},
    {"text": "2", "meta": {"set": None, "n": 3}, "a.b": "x"},
    {"text": "3", "meta": None, "a.b": "1"},
]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["meta.set!=ArXiv"], "123"),
        (["meta.set=ArXiv"], "0"),
        (["meta.set!=ArXiv", "meta.set!=GitHub"], "23"),
        (["meta.set=null"], "23"),
        (["meta.n=2"], "1"),
        (["meta.n!=1", "a.b=x"], "2"),
        (["a.b=1"], "3"),
        (["meta.n=true"], ""),
        (["meta.set=None"], ""),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_filters_select_records(tmp_path, filters, expected, name):
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        path.write_text(
            "\n".join(map(json.dumps, RECORDS)) if name == "a.jsonl" else json.dumps(RECORDS)
        )
    skipped = Counter()
    chosen = tuple(map(Filter.parse, filters))
    assert "".join(read_texts([path], filters=chosen, skipped=skipped)) == expected
    assert skipped == Counter({"filtered": 4 - len(expected)})
    missing = refusal_of([path], filters=(Filter.parse("meta.sat!=x"),))
    assert (
        "no column 'meta.sat'" in missing
        or "line 1: no key 'meta.sat'" in missing
        or ("record 1: no key 'meta.sat'" in missing)
    )


@pytest.mark.parametrize("text", ["", "a", "=x", "!=x", "a==x", "a!==x"])
def test_filters_of_another_form_are_refused(text):
    with pytest.raises(InputError, match="not of the form KEY=VALUE or KEY!=VALUE"):
        Filter.parse(text)


def test_a_filter_needs_records(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "a text file has no keys" in refusal_of([tmp_path], filters=(Filter.parse("a=1"),))
