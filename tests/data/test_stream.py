"""The stream, against its definition read out slowly, and the promises made of it."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data.blend import Blend, Permutation
from megagrow.data.indexed import IndexedCorpus
from megagrow.data.stream import NO_LABEL, TokenStream

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=3)
BLOCK = st.integers(1, 12)


def _slow_corpus(size, seed, index, block_size, shuffle):
    """The offsets of a corpus, epoch after epoch."""
    epoch = 0
    while True:
        full = size // block_size
        order = list(range(full))
        if shuffle and full:
            permutation = Permutation(full, seed, index, epoch)
            order = [permutation(i) for i in range(full)]
        for block in order:
            yield from range(block * block_size, (block + 1) * block_size)
        yield from range(full * block_size, size)
        epoch += 1


def _slow_stream(sizes, weights, seed, block_size, shuffle, count):
    """The first `count` places (corpus, offset) of the stream."""
    blend = Blend(weights)
    corpora = [_slow_corpus(n, seed, i, block_size, shuffle) for i, n in enumerate(sizes)]
    places, slot = [], 0
    while len(places) < count:
        corpus = blend.corpus_of(slot)
        places += [(corpus, next(corpora[corpus])) for _ in range(block_size)]
        slot += 1
    return places[:count]


@given(
    sizes=SIZES,
    block=BLOCK,
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
    start=st.integers(0, 150),
    count=st.integers(1, 100),
)
@settings(max_examples=80, deadline=None)
def test_equals_its_definition(memory_corpora, sizes, block, seed, shuffle, start, count):
    weights = [1.0 + i for i in range(len(sizes))]
    stream = TokenStream(memory_corpora(sizes), weights, seed, block, shuffle)
    places = _slow_stream(sizes, weights, seed, block, shuffle, start + count)
    assert [stream.tokens_read(i, start) for i in range(len(sizes))] == [
        sum(corpus == i for corpus, _ in places[:start]) for i in range(len(sizes))
    ]
    tokens = stream.read(start, count)
    assert tokens.inputs.tolist() == [1000 * c + o for c, o in places[start:]]
    labels = [1000 * c + o + 1 if o + 1 < sizes[c] else NO_LABEL for c, o in places[start:]]
    assert tokens.labels.tolist() == labels
    follows = [b == (a[0], a[1] + 1) and b[1] % 7 != 0 for a, b in pairwise([(-1, 0), *places])]
    assert tokens.boundaries.tolist() == [not f for f in follows[start:]]


@given(sizes=SIZES, block=BLOCK, data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_stops_and_read_sizes_give_the_same_stream(memory_corpora, sizes, block, data):
    weights = [1.0] * len(sizes)
    whole = TokenStream(memory_corpora(sizes), weights, 5, block).read(0, 200)
    cuts = sorted({0, 200} | set(data.draw(st.lists(st.integers(0, 200), max_size=20))))
    # A new stream for each piece: all that a stopped run keeps is its position.
    pieces = [
        TokenStream(memory_corpora(sizes), weights, 5, block).read(low, high - low)
        for low, high in pairwise(cuts)
    ]
    for field in ("inputs", "labels", "boundaries"):
        joined = np.concatenate([getattr(piece, field) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(whole, field))


@given(size=st.integers(1, 80), block=BLOCK, epoch=st.integers(0, 5), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_each_token_once(memory_corpora, size, block, epoch, seed):
    stream = TokenStream(memory_corpora([size]), [1.0], seed, block)
    read = stream.read(epoch * size, size).inputs.tolist()
    assert sorted(read) == list(range(size))


def test_blended_corpora_each_have_their_epochs(memory_corpora):
    sizes = [50, 33]
    stream = TokenStream(memory_corpora(sizes), [2.0, 1.0], 3, 8)
    read = stream.read(0, 8 * 900).inputs.tolist()
    for corpus, size in enumerate(sizes):
        own = [token - 1000 * corpus for token in read if token // 1000 == corpus]
        epochs, rest = divmod(len(own), size)
        counts = Counter(own)
        assert set(counts.values()) <= {epochs, epochs + 1}
        assert sum(count == epochs + 1 for count in counts.values()) == rest
        for epoch in range(epochs):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.9, 0.1]])
def test_weights_hold_in_tokens_whatever_the_sizes(memory_corpora, weights):
    # The second corpus is far shorter than a block: slots of whole blocks would starve it.
    stream = TokenStream(memory_corpora([500, 3]), weights, 0, 16)
    tokens = stream.read(0, 16 * 1000).inputs
    share = float(np.mean(tokens >= 1000))
    assert share == pytest.approx(weights[1] / sum(weights), abs=0.002)


def test_orders_depend_on_epoch_seed_and_corpus(memory_corpora):
    def order(seed, epoch, sizes, corpus):
        stream = TokenStream(memory_corpora(sizes), [1.0] * len(sizes), seed, 2)
        read = stream.read(0, 1200).inputs
        own = read[read // 1000 == corpus] - 1000 * corpus
        return tuple(own[epoch * 100 : (epoch + 1) * 100].tolist())

    orders = [order(0, 0, [100], 0), order(0, 1, [100], 0), order(1, 0, [100], 0)]
    orders.append(order(0, 0, [100, 100], 1))
    assert len(set(orders)) == 4
    assert orders[0] != tuple(range(100))


def test_unshuffled_is_file_order(memory_corpora):
    stream = TokenStream(memory_corpora([30]), [1.0], 9, 4, shuffle=False)
    tokens = stream.read(0, 60)
    assert tokens.inputs.tolist() == [*range(30), *range(30)]
    # Blocks that follow each other in the file are no boundary.
    assert np.flatnonzero(tokens.boundaries[:30]).tolist() == [0, 7, 14, 21, 28]


@given(sizes=SIZES, block=BLOCK, shuffle=st.booleans())
@settings(max_examples=40, deadline=None)
def test_epoch_tokens_is_the_first_repetition(memory_corpora, sizes, block, shuffle):
    stream = TokenStream(memory_corpora(sizes), [1.0] * len(sizes), 1, block, shuffle)
    end = stream.epoch_tokens
    read = stream.read(0, end + 1).inputs.tolist()
    assert len(set(read[:end])) == end
    assert read[end] in read[:end]


def test_a_terabyte_needs_no_memory(memory_corpora):
    """Places in a corpus of 10^12 tokens, in its third epoch, without an array of its size."""
    (corpus,) = memory_corpora([10])
    corpus.num_tokens = 10**12
    stream = TokenStream([corpus], [1.0], 1, 2048)
    place = stream.locate(2 * 10**12 + 12345)
    assert 0 <= place.offset < 10**12 and place.offset % 2048 == 12345 % 2048
    arrays = [v for v in vars(stream._blend).values() if isinstance(v, np.ndarray)]
    assert all(array.nbytes < 100_000 for array in arrays)
    assert not any(isinstance(value, np.ndarray) for value in vars(stream).values())


def test_reads_indexed_files(tmp_path, indexed_files):
    indexed_files(tmp_path / "c", [[1, 2, 3], [4, 5], [6]], [0, 2, 3])
    stream = TokenStream([IndexedCorpus(tmp_path / "c")], [1.0], 0, 4, shuffle=False)
    tokens = stream.read(0, 6)
    assert tokens.inputs.tolist() == [1, 2, 3, 4, 5, 6]
    assert tokens.labels.tolist() == [2, 3, 4, 5, 6, NO_LABEL]
    assert tokens.boundaries.tolist() == [True, False, False, False, False, True]
    assert tokens.inputs.dtype == tokens.labels.dtype == np.int64
