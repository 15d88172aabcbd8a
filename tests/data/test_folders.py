"""Folder sources: which files are read, in which order, and which are skipped."""

import gzip
import os

import pytest

from megagrow.data.sources.folders import Selection
from tests.helpers.sources import json_lines, read_texts, refusal_of, skipped_files


def test_folders_are_walked_in_order_and_by_name(tmp_path, small_units):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "1.txt").write_text("first\r\n", newline="")
    (tmp_path / "b" / "d.TXT.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "e.md").write_text("third", encoding="utf-8-sig")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "z.py").write_text("fourth")
    (tmp_path / "z.tar").write_bytes(bytes(257) + b"ustar" + bytes(1000))
    (tmp_path / "z.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "z16.txt").write_text("x", encoding="utf-16")
    (tmp_path / "z.bin").write_bytes(b"ab\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "pipe")
    assert read_texts([tmp_path]) == ["first\r\n", "second", "third", "fourth"]
    assert read_texts([tmp_path / "z.py", tmp_path / "b"]) == ["fourth", "first\r\n", "second"]
    assert skipped_files(tmp_path) == {
        ".git": "hidden",
        "pipe": "not a regular file",
        "z.bin": "not text",
        "z.tar": "a tar archive; extract it",
        "z.zip": "a zip archive; extract it",
        "z16.txt": "UTF-16 text; convert it to UTF-8",
    }
    assert f"{tmp_path / 'z.bin'}: not text" in refusal_of([tmp_path / "z.bin"])


def test_links_are_followed_once(tmp_path):
    for name in ("real", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(name)
    source = tmp_path / "real"
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "c").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "up").symlink_to(source)
    (source / "d.txt").symlink_to(source / "a.txt")
    (source / "e.txt").symlink_to("missing")
    (source / "f.txt").symlink_to("f.txt")
    (tmp_path / "link").symlink_to(source)
    assert read_texts([source]) == read_texts([tmp_path / "link"]) == ["real", "elsewhere/deep"]
    assert skipped_files(source) == {
        "b/up": "the same folder as the source",
        "c": "the same folder as b/deep",
        "d.txt": "the same file as a.txt",
        "e.txt": "a broken link",
        "f.txt": "a broken link",
    }
    assert read_texts([source, source / "b"]) == [
        "real",
        "elsewhere/deep",
        "elsewhere/deep",
        "real",
    ]


def test_a_dataset_is_read_without_its_documentation(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(json_lines(["data"]))
    (tmp_path / "data" / "one.json").write_text('{"text": "one document"}')
    (tmp_path / "info.json").write_text('{"dataset": {"text": 1}}')
    for name in ("README.md", "LICENSE", "Readme.txt", "licence-mit.txt", "loader.py"):
        (tmp_path / name).write_text("not data")
    (tmp_path / "book.txt").write_text("book")
    assert read_texts([tmp_path]) == ["book", "one document", "data"]
    reason = "not data, in a folder with data files; use --include to read it"
    assert skipped_files(tmp_path) == {
        "LICENSE": reason,
        "README.md": reason,
        "Readme.txt": reason,
        "info.json": "a JSON object without the key 'text'",
        "licence-mit.txt": reason,
        "loader.py": reason,
    }
    assert read_texts([tmp_path], selection=Selection(include=("*.md", "data"))) == [
        "not data",
        "one document",
        "data",
    ]
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    assert len(read_texts([tmp_path])) == 6  # without a data file every text is read
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.json").write_text('{"content": "x"}')
    assert "no files to read in this folder; skipped 1: a JSON object without" in refusal_of([only])


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.txt"], [], "a/b/x.txt a/x.txt"),
        (["a/b"], [], "a/b/x.py a/b/x.txt"),
        (["./a/b/"], ["*.py"], "a/b/x.txt"),
        ([], ["b", "c.d"], "a/x.txt"),
        ([], ["a/*.txt"], "a/b/x.py c.d/x.md"),
        (["*.md", "*.py"], [], "a/b/x.py c.d/x.md"),
        (["[xy].p?"], [], "a/b/x.py"),
        (["*.TXT"], [], ""),
    ],
)
def test_patterns_select_files(tmp_path, include, exclude, expected):
    for name in ("a/b/x.txt", "a/b/x.py", "a/x.txt", "c.d/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    selection = Selection(tuple(include), tuple(exclude))
    if not expected:
        assert "no files to read in this folder; skipped" in refusal_of(
            [tmp_path], selection=selection
        )
        return
    assert read_texts([tmp_path], selection=selection) == expected.split()
    assert "no source is a folder" in refusal_of([tmp_path / "a/x.txt"], selection=selection)


@pytest.mark.parametrize(
    "name",
    [
        *("a.jl", "a.JSONLINES", "a.jsonl.gzip", "a.jsonl-00000-of-00010", "a.jsonl-00001.gz"),
        *("a.jsonl.1", "a.ndjson.bak", "a.ndjson~", "part-00000", "part-00000.c000", "a.txt"),
    ],
)
def test_json_lines_are_found_under_any_name(tmp_path, name):
    texts, content = ["first", "second"], json_lines(["first", "second"])
    content = gzip.compress(content) if name.endswith(("gzip", "gz")) else content
    (tmp_path / name).write_bytes(content)
    assert read_texts([tmp_path / name]) == read_texts([tmp_path]) == texts


def test_other_text_is_not_taken_for_json(tmp_path):
    for name, text in (("a.txt", '{"a": 1}\n'), ("b.py", '{\n"a": 1}'), ("c.md", "{}\n{a}")):
        (tmp_path / name).write_text(text)
    assert len(read_texts([tmp_path])) == 3
    assert "the sources are text files, which have no keys" in refusal_of([tmp_path], key="body")
    (tmp_path / "table.csv").write_text("text\nhello")
    assert skipped_files(tmp_path) == {"table.csv": "a table; convert it to JSON lines or Parquet"}
    assert "a table" in refusal_of([tmp_path / "table.csv"])
