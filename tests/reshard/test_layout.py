"""Ownership by arithmetic on ranges, against the same cut made of tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.reshard.copy_ops import block_view
from megagrow.reshard.index_ranges import overlap, shift
from megagrow.reshard.layout import Block, Layout, blocks_of
from tests.helpers.reshard.definition import held, numbered
from tests.helpers.reshard.models import layouts, models

PADDING = -1
RANGES = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda t: range(min(t), max(t)))


def world(layout: Layout) -> range:
    return range(layout.world_size)


def part_of(whole: torch.Tensor, block: Block) -> torch.Tensor:
    return whole[block.rows.start : block.rows.stop, block.cols.start : block.cols.stop]


@given(RANGES, st.integers(1, 13))
def test_blocks_of_an_interval_cover_it_once_and_in_order(interval, cols):
    elements = torch.arange(60 + cols - 60 % cols).view(-1, cols)
    blocks = list(blocks_of(interval, cols))
    covered = [int(x) for block in blocks for x in part_of(elements, block).flatten()]
    assert covered == list(interval)
    assert len(blocks) <= 3


@given(RANGES, RANGES, st.integers(-50, 50))
def test_overlap_is_what_both_contain(a, b, by):
    assert set(overlap(a, b)) == set(a) & set(b)
    assert list(shift(a, by)) == [x + by for x in a]


@settings(max_examples=60, deadline=None)
@given(st.data(), models())
def test_intervals_are_where_the_definition_cuts(data, config):
    layout = data.draw(layouts(config))
    numbers = numbered(layout.plan)
    for rank in world(layout):
        stored = held(layout, numbers, rank, PADDING)
        sizes = {name: len(layout.interval(name, rank)) for name in layout.plan}
        assert {name: size for name, size in sizes.items() if size} == {
            name: tensor.numel() for name, tensor in stored.items()
        }


@settings(max_examples=60, deadline=None)
@given(st.data(), models())
def test_blocks_are_what_is_stored_and_local_is_where(data, config):
    layout = data.draw(layouts(config))
    numbers = numbered(layout.plan)
    for rank in world(layout):
        stored = held(layout, numbers, rank, PADDING)
        for name in layout.plan:
            found = []
            for block in layout.blocks(name, rank):
                view = block_view(stored[name], block, *layout.local(name, rank, block))
                assert torch.equal(view, part_of(numbers[name], block))
                found += view.flatten().tolist()
            expected = stored.get(name, torch.tensor([])).tolist()
            assert found == [number for number in expected if number != PADDING]


@settings(max_examples=60, deadline=None)
@given(st.data(), models())
def test_all_ranks_tile_every_tensor_and_one_of_each_replica_saves(data, config):
    layout = data.draw(layouts(config))
    for name, spec in layout.plan.items():
        copies, saved = (torch.zeros(spec.rows, spec.cols, dtype=torch.int) for _ in range(2))
        for rank in world(layout):
            for block in layout.blocks(name, rank):
                part_of(copies, block).add_(1)
                part_of(saved, block).add_(int(layout.writes(name, rank)))
        replicas = layout.dp if layout.zero_stage == 0 else 1
        replicas *= layout.tp if spec.tp_dim is None else 1
        assert (copies == replicas).all(), name
        assert (saved == 1).all(), name


def ranges_within(size: int) -> st.SearchStrategy[range]:
    return st.integers(0, size - 1).flatmap(
        lambda start: st.integers(start + 1, size).map(lambda stop: range(start, stop))
    )


@settings(max_examples=100, deadline=None)
@given(st.data(), models())
def test_holders_share_out_what_is_wanted_and_do_hold_it(data, config):
    layout = data.draw(layouts(config))
    spec = layout.plan[data.draw(st.sampled_from(sorted(layout.plan)))]
    wanted = Block(data.draw(ranges_within(spec.rows)), data.draw(ranges_within(spec.cols)))
    near = data.draw(st.integers(0, 47))
    numbers = numbered(layout.plan)
    covered = torch.zeros(spec.rows, spec.cols, dtype=torch.int)
    by_rank: dict[int, set[int]] = {rank: set() for rank in range(48)}
    for rank, part in layout.holders(spec.name, wanted, near):
        part_of(covered, part).add_(1)
        theirs = part_of(numbers[spec.name], part).flatten().tolist()
        stored = set(held(layout, numbers, rank, PADDING)[spec.name].tolist())
        assert set(theirs) <= stored
        by_rank[rank].update(theirs)
    asked = torch.zeros_like(covered)
    part_of(asked, wanted).fill_(1)
    assert torch.equal(covered, asked)
    if near in world(layout):
        at_hand = held(layout, numbers, near, PADDING).get(spec.name, torch.tensor([])).tolist()
        needed = part_of(numbers[spec.name], wanted).flatten().tolist()
        assert by_rank[near] == set(at_hand) & set(needed), "what is at hand is not sent for"
