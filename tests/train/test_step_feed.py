"""Micro-batches read one step ahead: which reads happen, in which thread, and how they fail."""

import threading
from dataclasses import replace

import pytest
import torch

import megagrow.train.step_feed
from megagrow.config.stage import BatchConfig
from megagrow.data.batches import BatchReader
from megagrow.data.stage_streams import StageStreams, StreamPlace
from megagrow.errors import DataError
from megagrow.model.ops import PLAIN
from megagrow.parallel.context.shards import SequenceShard
from megagrow.train.data_setup import open_inputs
from megagrow.train.step_feed import StepFeed, StepPart
from tests.helpers.runs import STEP_TOKENS, make_run

BATCH = BatchConfig(global_batch_size=4, micro_batch_size=1)
FIRST = StepPart(StreamPlace(0), BATCH, 1, 2, PLAIN.pack, torch.device("cpu"), SequenceShard())
SECOND = replace(FIRST, place=StreamPlace(STEP_TOKENS))


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> StageStreams:
    tmp = tmp_path_factory.mktemp("corpus")
    data = {"train": tmp / "train", "sequence_length": 16, "reset_attention_mask": True}
    return open_inputs(make_run(tmp, [{"tokens": 640}], data=data)).train


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, str]]:
    """(position, thread) of every micro-batch read."""
    read, seen = BatchReader.read, []

    def watched(self, position, indices):
        seen.append((position, threading.current_thread().name))
        return read(self, position, indices)

    monkeypatch.setattr(BatchReader, "read", watched)
    return seen


def test_a_prefetched_step_is_read_once_and_in_the_thread(reader, reads):
    with StepFeed(reader) as feed:
        feed.prefetch(FIRST)
        batches = feed.read(FIRST)
        assert feed.read(FIRST) is batches
        feed.prefetch(SECOND)
        feed.read(SECOND)
    assert reads == [(0, "next batch")] * 2 + [(STEP_TOKENS, "next batch")] * 2
    for batch, expected in zip(batches, FIRST.read(reader), strict=True):
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.documents, expected.document_ids), "packed"


@pytest.mark.parametrize(
    "other",
    [
        SECOND,
        replace(FIRST, dp_rank=0),
        replace(FIRST, batch=BATCH.model_copy(update={"micro_batch_size": 2})),
        replace(FIRST, pack=lambda ids: ids + 1),
        replace(FIRST, shard=SequenceShard(1, 2)),
    ],
    ids=["position", "rank", "batch", "backend", "shard"],
)
def test_another_step_than_the_prefetched_one_is_read_anew(reader, other):
    with StepFeed(reader) as feed:
        feed.prefetch(FIRST)
        for batch, expected in zip(feed.read(other), other.read(reader), strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(batch.documents, expected.documents)


def test_an_error_belongs_to_its_step(reader, monkeypatch):
    read = BatchReader.read

    def failing(self, position, indices):
        if position == STEP_TOKENS:
            raise DataError("damaged")
        return read(self, position, indices)

    monkeypatch.setattr(BatchReader, "read", failing)
    with StepFeed(reader) as feed:
        feed.read(FIRST)
        feed.prefetch(SECOND)
        for _ in range(2):
            with pytest.raises(DataError, match="damaged"):
                feed.read(SECOND)
        assert len(feed.read(FIRST)) == 2, "a step that is not affected"


def test_the_thread_ends_with_the_feed_and_a_frozen_one_does_not_hold_it(reader, monkeypatch):
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "next batch"]

    with StepFeed(reader) as feed:
        feed.prefetch(FIRST)
    assert threads() == []
    thaw = threading.Event()
    monkeypatch.setattr(BatchReader, "read", lambda *_: thaw.wait())
    monkeypatch.setattr(megagrow.train.step_feed, "CLOSE_SECONDS", 0.05)
    with StepFeed(reader) as feed:
        feed.prefetch(FIRST)
    (frozen,) = threads()
    assert frozen.daemon, "the interpreter does not wait for it either"
    thaw.set()
    frozen.join()


def test_inputs_for_a_gpu_are_pinned_in_the_context_of_its_device(reader, monkeypatch):
    """Another device's context would take half a gigabyte of its memory for every rank."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pin") or x)
    part = replace(FIRST, device=torch.device("cuda", 3))
    part.read(reader)
    assert calls == [part.device] + ["pin"] * 8, "ids, labels, positions and documents, two each"
