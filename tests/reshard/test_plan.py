"""The copies of a plan, carried out in one process, make exactly the target of the definition."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.growth.map import GrowthMap, identity_map
from megagrow.parallel.zero import STATE_KINDS
from megagrow.reshard.layout import Layout
from megagrow.reshard.move import read_rows, write_rows
from megagrow.reshard.plan import copies_to
from tests.hugging_face import tiny
from tests.reshard.definition import (
    State,
    empty_storage,
    grown,
    held,
    numbered,
    random_state,
    same,
    storage_of,
)
from tests.reshard.growths import stacks, widenings
from tests.reshard.models import layout_of, layouts, models

thorough = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def carry_out(
    source: Layout, growth: GrowthMap, target: Layout, state: State, at_once: int, near: int | None
) -> None:
    """Fills every target rank from the source ranks' storages and compares with the definition."""
    growth.check(list(source.plan), list(target.plan))
    storages = [storage_of(source, state, rank) for rank in range(source.dp * source.tp)]
    after = grown(state, growth)
    for rank in range(target.dp * target.tp):
        mine = empty_storage(target, rank)
        for copy in copies_to(rank, source, growth, target, near):
            for first in range(0, copy.shape[0], at_once):
                rows = range(first, min(first + at_once, copy.shape[0]))
                for kind in STATE_KINDS:
                    theirs = storages[copy.source_rank]
                    values = read_rows(copy, kind, rows, source, theirs)
                    write_rows(copy, kind, rows, values, target, mine)
        assert same(mine, storage_of(target, after, rank)), rank


def near_of(data: st.DataObject) -> int | None:
    """Files are read near rank 0; a live exchange reads near each rank itself."""
    return data.draw(st.sampled_from([0, None]))


@thorough
@given(st.data(), models(), st.integers(1, 7))
def test_identity_is_a_plain_reshard(data, config, at_once):
    source, target = data.draw(layouts(config)), data.draw(layouts(config))
    state = random_state(source.plan)
    carry_out(source, identity_map(list(source.plan)), target, state, at_once, near_of(data))


@thorough
@given(st.data(), models(), st.integers(1, 7))
def test_stacks(data, config, at_once):
    deeper, growth = data.draw(stacks(config))
    source, target = data.draw(layouts(config)), data.draw(layouts(deeper))
    carry_out(source, growth, target, random_state(source.plan), at_once, near_of(data))


@thorough
@given(st.data(), models(), models(), st.integers(1, 7))
def test_gathers_along_every_axis(data, config, wider, at_once):
    wider, growth = data.draw(widenings(config, wider))
    source, target = data.draw(layouts(config)), data.draw(layouts(wider))
    carry_out(source, growth, target, random_state(source.plan), at_once, near_of(data))


@thorough
@given(st.data(), models())
def test_what_a_rank_holds_it_takes_from_itself(data, config):
    deeper, growth = data.draw(stacks(config))
    source, target = data.draw(layouts(config)), data.draw(layouts(deeper))
    numbers = numbered(source.plan)
    origin = {name: numbers[term.source] for name, term in growth.terms.items()}
    for rank in range(min(source.dp * source.tp, target.dp * target.tp)):
        needed = torch.cat([*held(target, origin, rank, -1).values(), torch.tensor([])])
        at_hand = torch.cat([*held(source, numbers, rank, -1).values(), torch.tensor([])])
        missing = needed[(needed >= 0) & ~torch.isin(needed, at_hand)].numel()
        copies = list(copies_to(rank, source, growth, target))
        fetched = sum(c.shape[0] * c.shape[1] for c in copies if c.source_rank != rank)
        assert fetched == missing


def test_the_number_of_copies_does_not_grow_with_the_elements():
    counts = []
    for scale in (1, 8):
        config = tiny(hidden_size=32 * scale, intermediate_size=48 * scale, vocab_size=101 * scale)
        source, target = layout_of(config, 2, 2, 2), layout_of(config, 3, 4, 1)
        growth = identity_map(list(source.plan))
        counts.append(sum(len(list(copies_to(r, source, growth, target))) for r in range(4)))
    assert counts[1] <= 1.2 * counts[0]
