"""Batches: the same stream for every layout, documents kept apart, wrong tokens named."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.schema import CorpusConfig, StageDataConfig
from megagrow.data.batches import BatchReader, open_stream, sequences_of
from megagrow.data.stream import NO_LABEL, TokenStream
from megagrow.errors import InputError


def _config(length, **options):
    return StageDataConfig(train=[CorpusConfig(path="none")], sequence_length=length, **options)


@given(dp=st.integers(1, 5), micro=st.integers(1, 4), steps=st.integers(1, 4))
def test_each_sequence_belongs_to_one_rank_and_step(dp, micro, steps):
    total = dp * micro * steps
    of_ranks = [sequences_of(total, micro, rank, dp) for rank in range(dp)]
    assert all([len(step) for step in of_rank] == [micro] * steps for of_rank in of_ranks)
    in_order = [j for step in range(steps) for of_rank in of_ranks for j in of_rank[step]]
    assert in_order == list(range(total))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="global_batch_size 6 is not a multiple"):
        sequences_of(6, 2, 0, 2)


LAYOUT = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (4, 3), (6, 1), (1, 12)])


@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=3),
    block=st.integers(1, 12),
    length=st.integers(1, 9),
    layouts=st.lists(LAYOUT, min_size=1, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_the_stream_is_the_same_for_any_layout(memory_corpora, sizes, block, length, layouts):
    """A run of 12 sequences a step that is stopped after each step, and goes on with another
    data parallel size, micro batch and accumulation."""
    weights = [1.0 + i for i in range(len(sizes))]
    inputs, labels, position = [], [], 0
    for dp, micro in layouts:
        stream = TokenStream(memory_corpora(sizes), weights, 11, block)
        reader = BatchReader(stream, _config(length), 3000)
        rows = {}
        for rank in range(dp):
            for indices in sequences_of(12, micro, rank, dp):
                batch = reader.read(position, indices)
                rows |= {j: (batch.input_ids[i], batch.labels[i]) for i, j in enumerate(indices)}
        inputs += [rows[j][0] for j in range(12)]
        labels += [rows[j][1] for j in range(12)]
        position += 12 * length
    whole = TokenStream(memory_corpora(sizes), weights, 11, block).read(0, position)
    assert torch.cat(inputs).tolist() == whole.inputs.tolist()
    assert torch.cat(labels).tolist() == whole.labels.tolist()


def test_documents_are_kept_apart_when_asked(memory_corpora):
    stream = TokenStream(memory_corpora([40]), [1.0], 0, 8, shuffle=False)
    config = _config(10, reset_position_ids=True, reset_attention_mask=True)
    batch = BatchReader(stream, config, 100).read(0, [0, 1])
    # Documents start at multiples of 7: at 7 in the first sequence, at 14 in the second.
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2],
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 5],
    ]
    assert batch.document_ids.tolist() == [[0] * 7 + [1] * 3, [0] * 4 + [1] * 6]
    assert batch.labels[1].tolist() == list(range(11, 21))


def test_without_options_positions_count_and_documents_are_none(memory_corpora):
    stream = TokenStream(memory_corpora([40]), [1.0], 0, 8)
    batch = BatchReader(stream, _config(10), 100).read(0, [0, 2])
    assert batch.document_ids is None
    assert batch.position_ids.tolist() == [list(range(10))] * 2
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.dtype == torch.int64 and tensor.shape == (2, 10)


@given(sizes=st.lists(st.integers(2, 60), min_size=1, max_size=2), length=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_documents_equal_a_walk_over_the_boundaries(memory_corpora, sizes, length):
    stream = TokenStream(memory_corpora(sizes), [1.0] * len(sizes), 2, 6)
    config = _config(length, reset_position_ids=True, reset_attention_mask=True)
    batch = BatchReader(stream, config, 2000).read(length, [0, 1, 2])
    for j in range(3):
        boundaries = stream.read(length * (j + 1), length).boundaries
        position, document = -1, 0
        for i in range(length):
            restarts = boundaries[i] and i > 0
            position = 0 if restarts else position + 1
            document += int(restarts)
            assert batch.position_ids[j, i] == position
            assert batch.document_ids[j, i] == document


@pytest.mark.parametrize(("token", "letter", "code"), [(99, "i", 4), (-1, "i", 4), (10, "H", 8)])
def test_a_token_out_of_range_is_named_with_its_place(tmp_path, indexed_files, token, letter, code):
    indexed_files(tmp_path / "bad", [[1, 2, 3, 4, 5, token, 7, 8]], [0, 1], code, letter)
    stream = open_stream([CorpusConfig(path=tmp_path / "bad")], 0, 4, shuffle=False)
    reader = BatchReader(stream, _config(4), vocab_size=10)
    assert reader.read(0, [0]).input_ids.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(InputError) as caught:
        reader.read(0, [0, 1])
    assert f"{tmp_path}/bad.bin: token id {token} at token 5 " in str(caught.value)
    # It is refused as a label as well.
    with pytest.raises(InputError, match=f"token id {token} at token 5 "):
        reader.read(1, [0])


def test_the_largest_id_that_prepare_noted_is_checked_at_opening(tmp_path, indexed_files):
    indexed_files(tmp_path / "train", [[1, 2]], [0, 1])
    stream = open_stream([CorpusConfig(path=tmp_path / "train")], 0, 4)
    split = {"documents": 1, "tokens": 2, "max_token_id": 49}
    manifest = {
        "format": "megagrow corpus 1",
        "fingerprint": "",
        "sources": [],
        "tokenizer": "tokenizer.model",
        "tokenizer_checksum": "",
        "vocab_size": 50,
        "eos_id": 2,
        "splits": {"train": split},
        "files": {
            "train.bin": {"size": 4, "blake2b": "0" * 64},
            "train.idx": {"size": 62, "blake2b": "0" * 64},
        },
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    BatchReader(stream, _config(4), vocab_size=50)
    with pytest.raises(InputError, match=f"{tmp_path}/train: contains token ids up to 49"):
        BatchReader(stream, _config(4), vocab_size=49)
    indexed_files(tmp_path / "train", [[1, 2, 3]], [0, 1])
    with pytest.raises(InputError, match=r"train\.bin: 3 tokens, its manifest\.json records 2"):
        open_stream([CorpusConfig(path=tmp_path / "train")], 0, 4)
    (tmp_path / "manifest.json").write_text('{"format": "megagrow corpus 1"}')
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        BatchReader(stream, _config(4), vocab_size=50)
    (tmp_path / "manifest.json").write_text('{"name": "of another program"}')
    BatchReader(stream, _config(4), vocab_size=49)


def test_open_stream_blends_by_weight(tmp_path, indexed_files):
    indexed_files(tmp_path / "a", [[1] * 50], [0, 1])
    indexed_files(tmp_path / "b", [[2] * 50], [0, 1])
    corpora = [CorpusConfig(path=tmp_path / "a", weight=3), CorpusConfig(path=tmp_path / "b")]
    stream = open_stream(corpora, 0, 8)
    assert np.bincount(stream.read(0, 8 * 400).inputs).tolist() == [0, 2400, 800]
    last = stream.read(0, 8 * 400).labels
    assert set(np.unique(last)) == {NO_LABEL, 1, 2}
