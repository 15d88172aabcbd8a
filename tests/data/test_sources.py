"""Sources: found, cut and read the same way each time, whatever their format."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megagrow.data import sources
from megagrow.data.documents import read_documents
from megagrow.data.sources import find_units
from megagrow.errors import InputError

TEXTS = [f"text number {i}: \u00e9\u4f60 " + "x" * (i % 50) for i in range(500)]


def _lines(texts, key="text"):
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def _zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def _read(names, key="text"):
    return [
        doc.text for unit in find_units(list(map(str, names))) for doc in read_documents(unit, key)
    ]


def _refusal(names, key="text"):
    with pytest.raises(InputError) as caught:
        _read(names, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "SMALLEST_UNIT", 2000)
    monkeypatch.setattr(sources, "UNITS", 1 << 40)


def test_json_lines_in_any_ranges(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(TEXTS[:40]).rstrip(b"\n"))
    monkeypatch.setattr(sources, "UNITS", 1 << 40)
    for size in (*range(1, 40, 3), 97, 1000, 5000):
        monkeypatch.setattr(sources, "SMALLEST_UNIT", size)
        assert _read([path]) == TEXTS[:40]
        assert len(find_units([str(path)])) == -(-path.stat().st_size // size)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_compressed_json_lines_of_several_members(tmp_path, name):
    compress = gzip.compress if name.endswith("gz") else _zstd
    path = tmp_path / name
    path.write_bytes(compress(_lines(TEXTS[:200])) + compress(_lines(TEXTS[200:])))
    assert _read([path]) == TEXTS
    (unit,) = find_units([str(path)])
    assert sum(doc.size for doc in read_documents(unit, "text")) == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: damaged after line" in _refusal([path])


def test_parquet_in_ranges_of_row_groups(tmp_path, small_units):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": TEXTS, "n": list(range(500))})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    assert _read([path], "body") == TEXTS
    assert 1 < len(find_units([str(path)])) < 17
    assert f"{path}: no column 'text'" in _refusal([path])
    assert "row 1 from row group 0: no text under 'n'" in _refusal([path], "n")
    path.write_bytes(path.read_bytes()[:-50])
    assert f"{path}: not a parquet file" in _refusal([path])


def test_a_dataset_of_hugging_face_in_shards(tmp_path):
    for shard in range(3):
        (tmp_path / f"train-{shard}.jsonl").write_bytes(_lines(TEXTS[shard * 5 : shard * 5 + 5]))
    units = find_units([f"hf:{tmp_path}"])
    assert len(units) == 3
    assert _read([f"hf:{tmp_path}"]) == TEXTS[:15]
    assert _read([f"hf:{tmp_path}:default:train"]) == TEXTS[:15]
    assert "no text under 'body'" in _refusal([f"hf:{tmp_path}"], "body")
    assert "cannot open this dataset" in _refusal([f"hf:{tmp_path}::none"])
    assert "cannot open this dataset" in _refusal([f"hf:{tmp_path}/missing"])


def test_folders_are_walked_in_order_and_by_name(tmp_path, small_units):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "1.txt").write_text("first\r\n", newline="")
    (tmp_path / "b" / "d.jsonl").write_bytes(_lines(["second", "", "third"]) + b"\n")
    (tmp_path / "e.md").write_text("fourth", encoding="utf-8-sig")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "z.py").write_text("fifth")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(b"\xff")
    assert _read([tmp_path]) == ["first\r\n", "second", "third", "fourth", "fifth"]
    assert _read([tmp_path / "z.py", tmp_path / "b"]) == ["fifth", "first\r\n", "second", "third"]


def test_small_texts_share_units(tmp_path, small_units):
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text("y" * 100)
    units = find_units([str(tmp_path)])
    assert [len(unit.files) for unit in units] == [20] * 5
    assert sum(unit.size for unit in units) == 10_000


def test_a_changed_file_changes_its_unit_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(_lines(TEXTS[:3]))
    (tmp_path / "b.jsonl").write_bytes(_lines(TEXTS[3:6]))
    before = find_units([str(tmp_path)])
    assert before == find_units([str(tmp_path)])
    (tmp_path / "b.jsonl").write_bytes(_lines(TEXTS[3:7]))
    after = find_units([str(tmp_path)])
    assert after[0] == before[0] and after[1] != before[1]


def test_the_standard_library_is_there():
    units = find_units(["python-stdlib"])
    files = [file for unit in units for file in unit.files]
    assert sum(unit.size for unit in units) > 10e6
    assert len(units) > 2 and all(file.endswith(".py") for file in files)
    assert not any("site-packages" in file or "dist-packages" in file for file in files)
    assert files == sorted(files, key=lambda file: Path(file).parts)
    text = next(doc.text for doc in read_documents(units[0], "text") if "import" in doc.text)
    assert "def " in text


def test_missing_sources_are_named(tmp_path):
    assert f"{tmp_path}/no: no such file or folder" in _refusal([tmp_path / "no"])
    (tmp_path / "empty").mkdir()
    assert "no files in this folder" in _refusal([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"body": "x"}', "no text under the key 'text'"),
        (b'{"text": 5}', "no text under the key 'text'"),
        (b'["text"]', "no text under the key 'text'"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_lines_are_named_by_number(tmp_path, small_units, line, reason, suffix):
    path = tmp_path / f"bad.jsonl{suffix}"
    content = _lines(TEXTS[:100]) + b"\n" + line + b"\n" + _lines(TEXTS[:5])
    path.write_bytes(gzip.compress(content) if suffix else content)
    message = _refusal([path])
    assert f"{path}: line 102: " in message and reason in message


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff")
    assert f"{tmp_path}/bad.txt: not UTF-8 at byte 5" in _refusal([tmp_path])
