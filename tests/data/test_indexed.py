"""The indexed format, against readers and writers made of struct alone, and damaged in all ways."""

import os
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data.indexed import HEADER, IndexedCorpus, IndexedWriter, smallest_dtype
from megagrow.data.stream import TokenStream
from megagrow.errors import InputError

SEQUENCES = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
DOCUMENTS = [0, 2, 3, 4]


@pytest.fixture
def prefix(tmp_path, indexed_files):
    indexed_files(tmp_path / "corpus.v1", SEQUENCES, DOCUMENTS)
    return tmp_path / "corpus.v1"


@pytest.mark.parametrize(
    ("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")]
)
def test_reads_what_another_program_wrote(tmp_path, indexed_files, code, letter):
    indexed_files(tmp_path / "c", SEQUENCES, DOCUMENTS, code, letter)
    corpus = IndexedCorpus(tmp_path / "c")
    assert corpus.tokens[:].tolist() == list(range(5, 15))
    assert corpus.num_tokens == 10 and corpus.num_documents == 3
    assert corpus.document_starts(0, 10).tolist() == [0, 4, 6]


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_document_starts_equal_a_naive_search(indexed_files, lengths, data):
    if sum(lengths) == 0:
        lengths = [*lengths, 1]
    cuts = data.draw(st.lists(st.integers(0, len(lengths)), max_size=10))
    documents = sorted({0, len(lengths)} | set(cuts))
    begins = np.cumsum([0, *lengths])
    starts = {int(begins[d]) for d in documents[:-1]}
    with tempfile.TemporaryDirectory() as folder:
        indexed_files(Path(folder) / "c", [[1] * n for n in lengths], documents)
        corpus = IndexedCorpus(Path(folder) / "c")
        low = data.draw(st.integers(0, corpus.num_tokens))
        high = data.draw(st.integers(low, corpus.num_tokens))
        found = corpus.document_starts(low, high).tolist()
    assert sorted(set(found)) == sorted(s for s in starts if low <= s < high)


@pytest.mark.parametrize(("name", "letter", "code"), [("<u2", "H", 8), ("<i4", "i", 4)])
def test_another_program_reads_what_was_written(tmp_path, name, letter, code):
    with IndexedWriter(tmp_path / "c", np.dtype(name)) as writer:
        for document in ([1, 2, 3], [], [40000 if letter == "i" else 60000]):
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finalize()
    raw, idx = (tmp_path / "c.bin").read_bytes(), (tmp_path / "c.idx").read_bytes()
    size = struct.calcsize(letter)
    assert struct.unpack(f"<4{letter}", raw)[:3] == (1, 2, 3)
    assert idx[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<QBQQ", idx[9:34]) == (1, code, 3, 4)
    assert struct.unpack("<3i3q4q", idx[34:]) == (3, 0, 1, 0, 3 * size, 3 * size, 0, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_merged_parts_equal_the_whole(tmp_path):
    documents = [np.arange(n) for n in (3, 1, 5, 2)]
    with IndexedWriter(tmp_path / "whole", np.dtype("<u2")) as whole:
        for document in documents:
            whole.add_document(document)
        whole.finalize()
    for name, share in (("a", documents[:3]), ("none", []), ("b", documents[3:])):
        with IndexedWriter(tmp_path / name, np.dtype("<u2")) as part:
            for document in share:
                part.add_document(document)
            part.finalize()
    with IndexedWriter(tmp_path / "merged", np.dtype("<u2")) as merged:
        for name in ("a", "none", "b"):
            merged.append(tmp_path / name)
        merged.finalize()
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"merged{suffix}").read_bytes()
        assert ours == (tmp_path / f"whole{suffix}").read_bytes()


def test_an_unfinished_writer_leaves_the_old_corpus(prefix):
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(KeyboardInterrupt), IndexedWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document(np.array([1]))
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_vocabularies_choose_megatrons_dtype():
    assert smallest_dtype(65499) == np.uint16
    assert smallest_dtype(65500) == np.int32


def _refused(prefix: Path, culprit: str) -> str:
    """The one line that opening the corpus is refused with."""
    with pytest.raises(InputError) as caught:
        IndexedCorpus(prefix)
    message = str(caught.value)
    assert "\n" not in message and str(prefix) + culprit in message
    return message


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_empty_files_are_named(prefix, suffix):
    path = prefix.with_name(prefix.name + suffix)
    path.write_bytes(b"")
    assert "empty" in _refused(prefix, suffix)
    path.unlink()
    assert "No such file" in _refused(prefix, suffix)


def test_every_truncation_of_the_bin_is_refused(prefix):
    path = prefix.with_name(prefix.name + ".bin")
    content = path.read_bytes()
    for size in range(1, len(content)):
        path.write_bytes(content[:size])
        assert "truncated" in _refused(prefix, ".bin")
    path.write_bytes(content + b"\0\0")
    assert "describes" in _refused(prefix, ".idx")


def test_every_truncation_of_the_idx_is_refused(prefix):
    path = prefix.with_name(prefix.name + ".idx")
    content = path.read_bytes()
    for size in range(1, len(content)):
        path.write_bytes(content[:size])
        assert "broken index" in _refused(prefix, ".idx")
    path.write_bytes(content + b"\0")
    assert "broken index" in _refused(prefix, ".idx")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_truncated_while_in_use_is_named(prefix, suffix):
    """A memory map would end the process with SIGBUS."""
    corpus = IndexedCorpus(prefix)
    os.truncate(prefix.with_name(prefix.name + suffix), 0)
    with pytest.raises(InputError, match=f"{suffix}: truncated while in use, it had"):
        TokenStream([corpus], [1.0], 0, 4).read(0, 8)


def test_a_replaced_corpus_is_read_as_it_was_opened(prefix, indexed_files):
    corpus = IndexedCorpus(prefix)
    for suffix in (".bin", ".idx"):
        prefix.with_name(prefix.name + suffix).unlink()
    indexed_files(prefix, [[1, 2, 3]], [0, 1])
    assert corpus.tokens[:].tolist() == list(range(5, 15))
    assert corpus.document_starts(0, 10).tolist() == [0, 4, 6]


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [
        (0, "<B", 0),  # magic
        (9, "<Q", 2),  # version
        (17, "<B", 6),  # float64
        (17, "<B", 99),  # no dtype
        (18, "<Q", 2**62),  # sequences
        (26, "<Q", 2**63),  # documents
        (34, "<i", 4),  # a length in the middle
        (34 + 12, "<i", -4),  # the last length
        (34 + 16, "<q", 2),  # the first pointer
        (34 + 16 + 8, "<q", 2**40),  # a pointer in the middle
        (34 + 16 + 32, "<q", 1),  # the first document
        (34 + 16 + 32 + 8, "<q", 9),  # a document in the middle
        (34 + 16 + 32 + 24, "<q", 3),  # the last document
    ],
)
def test_every_broken_field_of_the_idx_is_refused(prefix, offset, layout, value):
    path = prefix.with_name(prefix.name + ".idx")
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, value)
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(prefix)):
        IndexedCorpus(prefix)


def test_a_corpus_without_sequences_is_refused(prefix, indexed_files):
    indexed_files(prefix, [], [0])
    prefix.with_name(prefix.name + ".bin").write_bytes(b"\0\0")
    assert "empty" in _refused(prefix, ".idx")


def test_a_lookup_does_not_read_the_whole_index(tmp_path):
    with IndexedWriter(tmp_path / "c", np.dtype("<u2")) as writer:
        for _ in range(50_000):
            writer.add_document(np.array([1, 2]))
        writer.finalize()
    corpus = IndexedCorpus(tmp_path / "c")
    tracemalloc.start()
    assert corpus.document_starts(70_001, 70_011).tolist() == [70002, 70004, 70006, 70008, 70010]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 < (tmp_path / "c.idx").stat().st_size - HEADER.size
