"""Pipeline schedules: complete, free of deadlocks, with the published bubbles."""

import pytest

from megagrow.config.stage import ParallelConfig
from megagrow.parallel.pipeline.schedule import Pass, needed, timeline
from megagrow.parallel.pipeline.split import PipelineSplit, pipeline_split
from tests.helpers.hugging_face import tiny

GRIDS = [(1, 1), *((ranks, chunks) for ranks in range(2, 9) for chunks in range(1, 5))]


@pytest.mark.parametrize(("ranks", "chunks"), GRIDS)
def test_every_pass_runs_once_on_its_rank_after_what_it_needs(ranks: int, chunks: int) -> None:
    for micro_batches in (*range(1, 18), 32):
        line = timeline(ranks, chunks, micro_batches)
        slots = {
            each: (rank, slot)
            for rank, row in enumerate(line)
            for slot, each in enumerate(row)
            if each is not None
        }
        assert len(slots) == 2 * ranks * chunks * micro_batches
        last = ranks * chunks - 1
        for each, (rank, slot) in slots.items():
            before = needed(each, last)
            assert each.chunk % ranks == rank
            assert before is None or slots[before][1] < slot
        for row in line:
            order = [each for each in row if each is not None]
            for kind in {each[:2] for each in order}:
                numbers = [each.micro_batch for each in order if each[:2] == kind]
                assert numbers == list(range(micro_batches)), "so the last one reduces"


@pytest.mark.parametrize(("ranks", "chunks"), GRIDS)
def test_the_bubble_is_that_of_the_paper(ranks: int, chunks: int) -> None:
    """(p - 1) / (m v) of the ideal time (Narayanan et al. 2021, sections 2.2.1 and 2.2.2)."""
    for micro_batches in (ranks, 2 * ranks, 4 * ranks):
        line = timeline(ranks, chunks, micro_batches)
        ideal = 2 * micro_batches * chunks
        assert len(line[0]) - ideal == 2 * (ranks - 1)


def in_flight(row: tuple[Pass | None, ...]) -> int:
    """The largest number of forward passes whose backward pass has not run."""
    now = most = 0
    for each in row:
        now += 0 if each is None else 1 if each.is_forward else -1
        most = max(most, now)
    return most


def test_1f1b_keeps_as_many_micro_batches_as_ranks_follow() -> None:
    assert [in_flight(row) for row in timeline(4, 1, 12)] == [4, 3, 2, 1]


def test_a_forward_schedule_has_no_backward_passes() -> None:
    line = timeline(3, 2, 6, trains=False)
    assert all(each is None or each.is_forward for row in line for each in row)
    assert len(line[0]) == 6 * 2 + 2


def split_of(layers: int, ranks: int, virtual: int, first: bool, last: bool) -> PipelineSplit:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=virtual,
        account_for_embedding_in_pipeline_split=first,
        account_for_loss_in_pipeline_split=last,
    )
    return pipeline_split(tiny(num_hidden_layers=layers), parallel)


@pytest.mark.parametrize("layers", [4, 5, 7, 12])
@pytest.mark.parametrize("ends", [(False, False), (True, False), (True, True)])
def test_every_layer_has_one_rank(layers: int, ends: tuple[bool, bool]) -> None:
    split = split_of(layers, 2, 2, *ends)
    held = {
        layer: rank
        for rank in range(2)
        for chunk in split.chunks_of(rank)
        for layer in split.layers(chunk)
    }
    assert held == {layer: split.rank_of_layer(layer) for layer in range(layers)}
    counted = [*split.chunks]
    counted[0], counted[-1] = counted[0] + ends[0], counted[-1] + ends[1]
    assert max(counted) - min(counted) <= 1


@pytest.mark.parametrize(
    ("layers", "ranks", "factor"), [(4, 2, 2), (5, 2, 3), (7, 3, 4), (8, 4, 2)]
)
def test_a_stack_in_as_many_chunks_keeps_every_copy_on_its_rank(
    layers: int, ranks: int, factor: int
) -> None:
    before = split_of(layers, ranks, 1, False, False)
    after = split_of(factor * layers, ranks, factor, False, False)
    for layer in range(factor * layers):
        assert after.rank_of_layer(layer) == before.rank_of_layer(layer % layers)
