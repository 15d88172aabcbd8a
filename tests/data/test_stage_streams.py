"""Streams of stages: shared, continued or restarted, and where each batch of a run begins."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.schema import RunConfig
from megagrow.data.batches import BatchReader
from megagrow.data.stage_streams import StageStreams, StreamPlace
from megagrow.data.stream import TokenStream
from megagrow.train.train_state import RunState
from tests.helpers.train.schedules import make_run, stage

SIZES = (64, 96, 45)


def streams_of(run: RunConfig, memory_corpora: Any, corpora: list[tuple[int, ...]]) -> StageStreams:
    """Streams over corpora in memory; those of each stage are given by their keys."""
    opened = memory_corpora(SIZES)
    readers = []
    for each, keys in zip(run.stages, corpora, strict=True):
        weights = [corpus.weight for corpus in each.data.train]
        own = [opened[key] for key in keys]
        length = each.data.sequence_length
        stream = TokenStream(own, weights, run.seed, length, keys=keys)
        readers.append(BatchReader(stream, each.data, 3000))
    return StageStreams(run.stages, readers, corpora)


def run_of(corpora: list[tuple[int, ...]], **data: Any) -> RunConfig:
    """A run of stages over corpora, with other data keys in all but the first."""
    return make_run(
        *(
            stage(4, data={"train": [f"/none/{key}" for key in keys], **(data if index else {})})
            for index, keys in enumerate(corpora)
        )
    )


def ids(streams: StageStreams, place: StreamPlace, sequences: int) -> list[int]:
    return streams.read(place, range(sequences)).input_ids.flatten().tolist()


@given(
    corpora=st.lists(st.sampled_from([(0,), (1,), (0, 1), (1, 0), (2, 1), (0, 1, 2)]), max_size=4),
    steps=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    growth=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_no_token_is_repeated_before_its_corpus_is_read(memory_corpora, corpora, steps, growth):
    """Whatever the mixtures are, and also where a growth reads tokens."""
    corpora = [(0, 1), *corpora]
    run = run_of(corpora)
    streams, state, seen = streams_of(run, memory_corpora, corpora), RunState(), []
    for index, count in enumerate(steps[: len(corpora)]):
        if index:
            read = growth * 8
            seen += ids(streams, state.next_place, growth) if growth else []
            state = state.after_growth((), tokens=read)
        for _ in range(count):
            seen += ids(streams, state.place, 1)
            state = moved(state, 8)
    for key, size in enumerate(SIZES):
        own = [token for token in seen if token // 1000 == key]
        first = own[:size]
        assert len(set(first)) == len(first)


def moved(state: RunState, tokens: int) -> RunState:
    """Return the state after a step."""
    counters = state.counters.__class__(tokens=state.counters.tokens + tokens)
    return RunState(
        **{**state.__dict__, "counters": counters, "stage_tokens": state.stage_tokens + tokens}
    )


def test_equal_data_is_one_stream(memory_corpora):
    corpora = [(0, 1)] * 3
    streams = streams_of(run_of(corpora), memory_corpora, corpora)
    begun = moved(RunState(), 32).after_growth(())
    assert ids(streams, begun.place, 2) == ids(streams, StreamPlace(32), 2)
    # Rewinds skip tokens in every stage.
    assert ids(streams, begun.place.after(16), 2) == ids(streams, StreamPlace(48), 2)


@pytest.mark.parametrize("position", ["continue", "restart"])
def test_a_corpus_continues_or_restarts(memory_corpora, position):
    corpora = [(0, 1), (1,), (0,)]
    run = run_of(corpora, corpus_position=position)
    streams = streams_of(run, memory_corpora, corpora)
    begin = moved(RunState(), 32)  # two blocks of each corpus
    second = moved(begin.after_growth(()), 16)
    alone = streams.readers[1].stream
    start = 16 if position == "continue" else 0
    assert ids(streams, begin.next_place, 2) == alone.read(start, 16).inputs.tolist()
    third = ids(streams, second.next_place, 1)
    assert third == streams.readers[2].stream.read(start, 8).inputs.tolist()
    # A rewind to a state of the first stage skips its tokens in the second one too.
    skipped = RunState(**{**begin.__dict__, "skipped_tokens": 8}).next_place
    shifted = 16 + 8 + (8 if streams.readers[0].stream.locate(32).corpus == 1 else 0)
    expected = alone.read(shifted if position == "continue" else 8, 8).inputs.tolist()
    assert ids(streams, skipped, 1) == expected


def test_another_length_counts_on_from_the_tokens_read(memory_corpora):
    corpora = [(0,), (0,)]
    run = run_of(corpora, sequence_length=16)
    streams = streams_of(run, memory_corpora, corpora)
    place = moved(RunState(), 32).next_place
    expected = streams.readers[1].stream.starting_at([32]).read(0, 32).inputs.tolist()
    assert ids(streams, place, 2) == expected
    assert streams.tokens_read(place.starts, 32 + 64) == {0: 96}
