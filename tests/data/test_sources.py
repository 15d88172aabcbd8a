"""Sources: found, cut and read the same way each time, whatever their format."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from megagrow.data.sources import units
from megagrow.data.sources.documents import Filter, RecordOptions, read_documents
from megagrow.data.sources.units import find_sources
from tests.helpers.sources import TEXTS, json_lines, read_texts, refusal_of

BOM = b"\xef\xbb\xbf"


def _long_window(content):
    """Compress like `zstd --long=31`, whose window exceeds the default limit of decompressors."""
    parameter = zstd.CompressionParameter
    options = {parameter.window_log: 31, parameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(content) + compressor.flush()


COMPRESSORS = {
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".ZST": _long_window,
}


def test_json_lines_in_any_ranges(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS[:40]).rstrip(b"\n"))
    monkeypatch.setattr(units, "UNITS", 1 << 40)
    for size in (*range(1, 40, 3), 97, 1000, 5000):
        monkeypatch.setattr(units, "SMALLEST_UNIT", size)
        assert read_texts([path]) == TEXTS[:40]
        assert len(find_sources([str(path)]).units) == -(-path.stat().st_size // size)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_json_lines_of_several_members(tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        compress(json_lines(TEXTS[:200])) + bytes(512) + compress(json_lines(TEXTS[200:]))
    )
    assert read_texts([path]) == TEXTS
    (unit,) = find_sources([str(path)]).units
    sizes = [doc.size for doc in read_documents(unit, RecordOptions())]
    assert path.stat().st_size - 512 <= sum(sizes) <= path.stat().st_size
    content = path.read_bytes()
    path.write_bytes(content + bytes(3))
    assert read_texts([path]) == TEXTS
    for damaged in (content[:-20], content + b"garbage"):
        path.write_bytes(damaged)
        assert "damaged" in refusal_of([path])


@pytest.mark.parametrize(
    "name", ["a.txt", "a", "a.JSON", "a.json", "a.ndjson", "b.JsonL", "part-0"]
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_names_and_compressions(tmp_path, name, suffix, bom):
    """The content decides on the compression and the layout, the extension on text or JSON."""
    compress = COMPRESSORS.get(suffix, bytes)
    path = tmp_path / (name + suffix)
    is_text = name in ("a.txt", "a")
    contents = {
        "lines": b"\r\n \n".join(json_lines(TEXTS[:9]).split(b"\n")),
        "list": json.dumps([{"text": text} for text in TEXTS[:9]], indent=1).encode(),
        "objects": b"".join(json.dumps({"text": text}, indent=1).encode() for text in TEXTS[:9]),
    }
    if is_text:
        contents = {"text": b"one\r\ntext {}\n"}
    elif not name.lower().endswith(".json"):
        del contents["objects"]
        if name == "part-0":
            del contents["list"]
    for content in contents.values():
        path.write_bytes(compress(bom + content))
        assert read_texts([path]) == (["one\r\ntext {}\n"] if is_text else TEXTS[:9])
        path.write_bytes(bom + content)  # decompressed by a browser
        assert read_texts([path]) == (["one\r\ntext {}\n"] if is_text else TEXTS[:9])


def test_parquet_in_ranges_of_row_groups(tmp_path, small_units):
    path = tmp_path / "a.parquet"
    nested = [{"name": f"n{i % 3}"} for i in range(500)]
    table = pyarrow.table({"body": TEXTS, "n": list(range(500)), "meta": nested})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    assert read_texts([path], "body") == TEXTS
    assert read_texts([path], "meta.name") == [row["name"] for row in nested]
    assert 1 < len(find_sources([str(path)]).units) < 17
    assert f"{path}: no column 'text'; its columns are body, n, meta" in refusal_of([path])
    assert f"{path}: row 1: the value under 'n' is of type int" in refusal_of([path], "n")
    renamed = tmp_path / "renamed"
    renamed.write_bytes(path.read_bytes())
    assert read_texts([renamed], "body") == TEXTS
    path.write_bytes(path.read_bytes()[:-50])
    assert f"{path}: not a parquet file" in refusal_of([path])
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "a compressed Parquet file; decompress it" in refusal_of([path])


def test_a_dataset_of_hugging_face_in_shards(tmp_path):
    for shard in range(3):
        content = zstd.compress(json_lines(TEXTS[shard * 5 : shard * 5 + 5]))
        (tmp_path / f"train-{shard}.jsonl.zst").write_bytes(content)
    assert len(find_sources([f"hf:{tmp_path}"]).units) == 3
    assert read_texts([f"hf:{tmp_path}"]) == TEXTS[:15]
    assert read_texts([f"hf:{tmp_path}:default:train"]) == TEXTS[:15]
    assert read_texts([f"hf:{tmp_path}"], filters=(Filter.parse("id!=1"),)) == []
    assert "no key 'body'" in refusal_of([f"hf:{tmp_path}"], "body")
    assert "cannot open this dataset" in refusal_of([f"hf:{tmp_path}::none"])
    assert "cannot open this dataset" in refusal_of([f"hf:{tmp_path}/missing"])


def test_small_texts_share_units(tmp_path, small_units):
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text("y" * 100)
    found = find_sources([str(tmp_path)]).units
    assert [len(unit.files) for unit in found] == [20] * 5
    assert sum(unit.size for unit in found) == 10_000


def test_a_changed_file_changes_its_unit_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:3]))
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS[3:6]))
    before = find_sources([str(tmp_path)]).units
    assert before == find_sources([str(tmp_path)]).units
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS[3:7]))
    after = find_sources([str(tmp_path)]).units
    assert after[0] == before[0] and after[1] != before[1]


def test_the_standard_library_is_there():
    found = find_sources(["python-stdlib"]).units
    files = [file for unit in found for file in unit.files]
    assert sum(unit.size for unit in found) > 10e6
    assert len(found) > 2 and all(file.endswith(".py") for file in files)
    assert not any("site-packages" in file or "dist-packages" in file for file in files)
    assert files == sorted(files, key=lambda file: Path(file).parts)
    text = next(
        doc.text for doc in read_documents(found[0], RecordOptions()) if "import" in doc.text
    )
    assert "def " in text


def test_missing_sources_are_named(tmp_path):
    assert f"{tmp_path}/no: no such file or folder" in refusal_of([tmp_path / "no"])
    (tmp_path / "empty").mkdir()
    assert "no files to read in this folder" in refusal_of([tmp_path / "empty"])
