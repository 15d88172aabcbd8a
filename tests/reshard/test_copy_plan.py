"""The copies of a plan, carried out in one process, make exactly the target of the definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megagrow.reshard.copy_ops
from megagrow.growth.map import GrowthMap, identity_map
from megagrow.parallel.sharding import ADAMW_KINDS
from megagrow.reshard.copy_ops import move_within
from megagrow.reshard.copy_plan import Copy, copies_from, copies_to
from megagrow.reshard.fill import fill_new
from megagrow.reshard.index_ranges import as_array
from megagrow.reshard.layout import Layout
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import (
    empty_storage,
    grown,
    random_state,
    same,
    storage_of,
)
from tests.helpers.reshard.growths import stacks, widenings
from tests.helpers.reshard.models import layout_of, layouts, models

thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def carry_out(
    source: Layout,
    growth: GrowthMap,
    target: Layout,
    at_once: int,
    near: int | None,
    empty: float = torch.nan,
) -> None:
    """Fills every target rank from the source ranks' storages and compares with the definition."""
    state = random_state(source.plan)
    storages = [storage_of(source, state, rank) for rank in range(source.world_size)]
    after = grown(state, growth, target.plan)
    for rank in range(target.world_size):
        mine = empty_storage(target, rank, empty)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(megagrow.reshard.copy_ops, "ELEMENTS_AT_ONCE", at_once)
            fill_new(growth, target, rank, mine)
            for kind in growth.kinds:
                for copy in copies_to(rank, source, growth, target, kind, near):
                    move_within(copy, source, storages[copy.source_rank], target, mine)
        assert same(mine, storage_of(target, after, rank)), rank


def near_of(data: st.DataObject) -> int | None:
    """Files are read near rank 0; a live exchange reads near each rank itself."""
    return data.draw(st.sampled_from([0, None]))


@thorough
@given(st.data(), models(), st.integers(1, 99))
def test_identity_is_a_plain_reshard(data, config, at_once):
    source, target = data.draw(layouts(config)), data.draw(layouts(config))
    carry_out(source, identity_map(list(source.plan)), target, at_once, near_of(data))


@thorough
@given(st.data(), models(), st.integers(1, 99))
def test_stacks(data, config, at_once):
    deeper, growth = data.draw(stacks(config))
    source, target = data.draw(layouts(config)), data.draw(layouts(deeper))
    carry_out(source, growth, target, at_once, near_of(data))


@thorough
@given(st.data(), models(), models(), st.integers(1, 99))
def test_gathers_along_every_axis(data, config, wider, at_once):
    wider, growth = data.draw(widenings(config, wider))
    source, target = data.draw(layouts(config)), data.draw(layouts(wider))
    # What nothing comes to stays as it was in the empty engine.
    carry_out(source, growth, target, at_once, near_of(data), empty=0.0)


@thorough
@given(st.data(), models(), models())
def test_what_a_rank_sends_is_what_the_others_receive_from_it(data, config, wider):
    deeper, growth = data.draw(st.one_of(stacks(config), widenings(config, wider)))
    source, target = data.draw(layouts(config)), data.draw(layouts(deeper))
    kind = data.draw(st.sampled_from(ADAMW_KINDS))
    received: dict[tuple[int, int], list] = {}
    sent: dict[tuple[int, int], list] = {}
    for rank in range(target.world_size):
        for copy in copies_to(rank, source, growth, target, kind):
            received.setdefault((copy.source_rank, rank), []).append(contents(copy))
    for rank in range(source.world_size):
        for copy in copies_from(rank, source, growth, target, kind):
            assert copy.source_rank == rank
            if copy.target_rank < target.world_size:
                sent.setdefault((rank, copy.target_rank), []).append(contents(copy))
    assert sent == received


def contents(copy: Copy) -> tuple:
    """All that a copy says, as values that can be compared."""
    takes = copy.take_rows, copy.take_cols, copy.target_rows, copy.target_cols
    said = copy.name, copy.kind, copy.term.source, copy.adds, copy.source
    return *said, *(as_array(positions).tolist() for positions in takes)


def test_the_number_of_copies_does_not_grow_with_the_elements():
    counts = []
    for scale in (1, 8):
        config = tiny(hidden_size=32 * scale, intermediate_size=48 * scale, vocab_size=101 * scale)
        source, target = layout_of(config, 2, 2, 2), layout_of(config, 3, 4, 1)
        growth = identity_map(list(source.plan))
        copies = [copies_to(rank, source, growth, target, "fp32") for rank in range(4)]
        counts.append(sum(len(list(found)) for found in copies))
    assert counts[1] <= 1.2 * counts[0]
