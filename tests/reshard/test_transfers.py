"""Messages between ranks: cut alike at both ends, complete, and no element twice."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.config.growth import GrowthConfig
from megagrow.growth.map import GrowthMap
from megagrow.growth.operators import growth_map
from megagrow.parallel.sharding import kinds_in
from megagrow.reshard.copy_ops import collect, deliver, move_within
from megagrow.reshard.fill import fill_new
from megagrow.reshard.index_ranges import as_array
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import RankPlan, TransferChunk, plan_rank, rounds
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import (
    empty_storage,
    grown,
    held,
    numbered,
    random_state,
    same,
    storage_of,
)
from tests.helpers.reshard.growths import stacks, widenings
from tests.helpers.reshard.models import TENSOR_PARALLEL, layout_of, models

thorough = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def reshards(draw: st.DrawFn) -> tuple[Layout, GrowthMap, Layout]:
    """Any growth between any two layouts of 4 ranks."""
    config = draw(models())
    grown_config, growth = draw(st.one_of(stacks(config), widenings(config, draw(models()))))
    sides = []
    for model in (config, grown_config):
        tp, decay = draw(st.sampled_from(TENSOR_PARALLEL)), draw(st.sampled_from(["all", "some"]))
        sides.append(layout_of(model, draw(st.integers(0, 3)), 4 // tp, tp, decay))
    return sides[0], growth, sides[1]


def plans(source: Layout, growth: GrowthMap, target: Layout) -> list[RankPlan]:
    return [plan_rank(rank, source, growth, target) for rank in range(4)]


def shape_of(pieces: list[TransferChunk]) -> list:
    return [
        (piece.transfer.name, piece.transfer.kind, as_array(piece.transfer.rows).tolist(),
         as_array(piece.transfer.cols).tolist(), piece.rows)
        for piece in pieces
    ]  # fmt: skip


@thorough
@given(reshards(), st.integers(1, 200))
def test_parcels_carried_round_by_round_fill_the_target(reshard, limit):
    source, growth, target = reshard
    state = random_state(source.plan)
    after = grown(state, growth, target.plan)
    theirs = [storage_of(source, state, rank) for rank in range(4)]
    found = plans(*reshard)
    for rank, plan in enumerate(found):
        mine = empty_storage(target, rank, 0.0)
        fill_new(growth, target, rank, mine)
        for copy in plan.copies.get(plan.rank, ()):
            move_within(copy, source, theirs[rank], target, mine)
        for peer, parcels in plan.incoming.items():
            sent = list(rounds(found[peer].outgoing[rank], limit))
            received = list(rounds(parcels, limit))
            assert list(map(shape_of, sent)) == list(map(shape_of, received))
            for out, into in zip(sent, received, strict=True):
                assert len(out) == 1 or sum(piece.numel for piece in out) <= limit
                for leaving, arriving in zip(out, into, strict=True):
                    box = torch.full(leaving.shape, torch.nan)
                    collect(leaving, box, source, theirs[peer])
                    for use in arriving.uses():
                        deliver(use, box, target, mine)
        assert same(mine, storage_of(target, after, rank)), rank


@thorough
@given(reshards())
def test_a_rank_is_sent_what_it_lacks_and_nothing_twice(reshard):
    source, growth, target = reshard
    numbers = numbered(source.plan)
    for rank, plan in enumerate(plans(*reshard)):
        at_hand = torch.cat([*held(source, numbers, rank, -1).values(), torch.tensor([])])
        for kind in kinds_in(target.plan):
            needed = needed_by(rank, numbers, growth, target, kind)
            sent = torch.cat(
                [
                    numbers[parcel.name][as_array(parcel.rows)][:, as_array(parcel.cols)].flatten()
                    for parcels in plan.incoming.values()
                    for parcel in parcels
                    if parcel.kind == kind
                ]
                or [torch.tensor([], dtype=torch.int64)]
            )
            missing = needed[~torch.isin(needed, at_hand)]
            assert sent.sort().values.tolist() == missing.tolist()


def needed_by(
    rank: int, numbers: dict, growth: GrowthMap, target: Layout, kind: str
) -> torch.Tensor:
    """The numbers of all source elements that a rank's target is made of, ascending, each once."""
    found = [torch.tensor([], dtype=torch.int64)]
    most = max((len(growth.terms(name, kind)) for name in target.plan), default=0)
    for term_number in range(most):
        origin = {}
        for name, spec in target.plan.items():
            terms = growth.terms(name, kind)
            origin[name] = torch.full((spec.rows, spec.cols), -1)
            if term_number < len(terms):
                origin[name] = read_by(terms[term_number], numbers)
        found += held(target, origin, rank, -1).values()
    every = torch.cat(found).unique()
    return every[every >= 0]


def read_by(term, numbers: dict) -> torch.Tensor:
    """For each target element the number of the source element that a gather takes, or -1."""
    source = numbers[term.source]
    rows, cols = (
        torch.arange(size) if axis.index is None else torch.from_numpy(axis.index)
        for axis, size in zip((term.rows, term.cols), source.shape, strict=True)
    )
    taken = source[rows][:, cols]
    return torch.where((rows >= 0)[:, None] & (cols >= 0), taken, -1)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("order", ["interleaved", "tiled"])
def test_an_interleaved_width_copy_moves_nothing_between_tensor_parallel_ranks(zero, order):
    small = tiny(num_key_value_heads=2)
    wide = tiny(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96)
    growth = growth_map(small, wide, GrowthConfig(operator=["direct_width"], copy_order=order))
    source, target = layout_of(small, zero, 2, 2), layout_of(wide, zero, 2, 2)
    across = {
        (rank, peer)
        for rank, plan in enumerate(plans(source, growth, target))
        for peer in plan.outgoing
        if rank % 2 != peer % 2
    }
    assert bool(across) == (order == "tiled")
