"""The live exchange between ranks: right in any number of rounds, thrifty, and bounded."""

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megagrow.config.schema import GrowthConfig, ModelConfig
from megagrow.growth.map import GrowthMap, identity_map
from megagrow.growth.operators import growth_map
from megagrow.parallel.sharding import ADAMW_KINDS, parameter_plan
from megagrow.reshard import exchange as exchange_module
from megagrow.reshard.exchange import BUCKET_BYTES, ShardedState, TransferStats, exchange
from megagrow.reshard.layout import Layout
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
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks

WORLD = 4
MODEL = tiny(num_hidden_layers=1, hidden_size=16, intermediate_size=24)
DEEP = MODEL.model_copy(update={"num_hidden_layers": 3})
GRIDS = {
    "zero 0, tp 2 to zero 3": ((0, 2, 2), (3, 4, 1)),
    "zero 1 to zero 2, tp 2": ((1, 4, 1), (2, 2, 2)),
    "zero 2, tp 2 to zero 3, tp 4": ((2, 2, 2), (3, 1, 4)),
    "zero 3, tp 2 to zero 0": ((3, 2, 2), (0, 4, 1)),
    "zero 3 to zero 3": ((3, 4, 1), (3, 4, 1)),
    "zero 2, tp 2 to zero 2, tp 2": ((2, 2, 2), (2, 2, 2)),
    "zero 0, tp 4 to zero 0, tp 4": ((0, 1, 4), (0, 1, 4)),
}
"""(ZeRO stage, DP, TP) before and after."""

SETTINGS = ((BUCKET_BYTES, False), (BUCKET_BYTES, True), (16 * 1024, True), (256, True))
"""Bucket size, and True if data is sent instead of read from shared memory. The default size takes
one round, the last holds less than a row for each peer."""


@dataclass(frozen=True)
class Case:
    """A growth and the layouts around it."""

    source: Layout
    growth: GrowthMap
    target: Layout


@dataclass(frozen=True)
class Run:
    """Result of one exchange on one rank."""

    right: bool
    moved: TransferStats
    in_flight: tuple[int, ...]
    """Bytes sent and received together in each round."""


@functools.cache
def cases() -> dict[str, Case]:
    out = {}
    for name, (before, after) in GRIDS.items():
        for what, model in (("same", MODEL), ("deep", DEEP)):
            source, target = layout_of(MODEL, *before), layout_of(model, *after)
            out[f"{name}, {what}"] = Case(source, map_to(model), target)
    return out


def map_to(model: ModelConfig) -> GrowthMap:
    if model == MODEL:
        return identity_map(list(parameter_plan(MODEL, 1)))
    return growth_map(MODEL, model, GrowthConfig(optimizer_state="transport"))


def measured(case: Case, bucket_bytes: int, network: bool) -> Run:
    rank = dist.get_rank()
    state = random_state(case.source.plan)
    mine = empty_storage(case.target, rank)
    in_flight: list[int] = []
    send = dist.all_to_all_single

    def counted(received: torch.Tensor, sent: torch.Tensor, *sizes: list[int]) -> None:
        in_flight.append(received.nbytes + sent.nbytes)
        send(received, sent, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        if network:
            patch.setattr(exchange_module, "on_one_host", lambda: False)
        source = ShardedState(case.source, storage_of(case.source, state, rank))
        moved = exchange(source, case.growth, ShardedState(case.target, mine), bucket_bytes)
    expected = storage_of(case.target, grown(state, case.growth, case.target.plan), rank)
    return Run(same(mine, expected), moved, tuple(in_flight))


def all_runs() -> dict[str, list[Run]]:
    return {
        name: [measured(case, *setting) for setting in SETTINGS] for name, case in cases().items()
    }


@pytest.fixture(scope="module")
def runs() -> dict[str, list[tuple[Run, ...]]]:
    """By case and setting: the runs of all ranks."""
    by_rank = run_ranks(WORLD, all_runs)
    return {name: list(zip(*(found[name] for found in by_rank), strict=True)) for name in cases()}


@pytest.mark.dist
@pytest.mark.parametrize("name", cases())
def test_any_bucket_size_makes_the_target_of_the_definition(runs, name):
    for setting, ranks in zip(SETTINGS, runs[name], strict=True):
        assert all(run.right for run in ranks), setting
        assert len({run.moved.rounds for run in ranks}) == 1
    assert all(run.moved.rounds <= 1 for run in (*runs[name][0], *runs[name][1]))


@pytest.mark.dist
@pytest.mark.parametrize("name", cases())
def test_every_byte_is_counted_and_none_sent_that_is_at_hand_or_twice(runs, name):
    case = cases()[name]
    numbers = numbered(case.source.plan)
    origin = {target: numbers[term.source] for target, (term,) in case.growth.weights.items()}
    local = missing = 0
    for rank in range(WORLD):
        wanted = torch.cat(list(held(case.target, origin, rank, -1).values()))
        at_hand = torch.cat(list(held(case.source, numbers, rank, -1).values()))
        wanted = wanted[wanted >= 0]
        from_here = torch.isin(wanted, at_hand)
        local += from_here.sum().item()
        missing += wanted[~from_here].unique().numel()
    bytes_each = 4 * len(ADAMW_KINDS)
    for ranks in runs[name]:
        assert sum(run.moved.bytes_sent for run in ranks) == bytes_each * missing
        assert sum(run.moved.bytes_local for run in ranks) == bytes_each * local


@pytest.mark.dist
def test_nothing_is_sent_where_nothing_changes(runs):
    unchanged = [n for n, (before, after) in GRIDS.items() if before == after]
    assert unchanged
    for name in unchanged:
        for run in sum(runs[f"{name}, same"], ()):
            assert run.moved.bytes_sent == 0 and run.in_flight == ()


@pytest.mark.dist
@pytest.mark.parametrize("name", cases())
def test_no_rank_has_more_than_a_bucket_in_flight(runs, name):
    row = 4 * max(spec.cols for spec in cases()[name].target.plan.values())
    for (bucket, network), ranks in zip(SETTINGS, runs[name], strict=True):
        # A bucket less than one row each way to each peer can not be kept to.
        limit = max(bucket, 2 * (WORLD - 1) * row)
        for run in ranks:
            assert len(run.in_flight) == run.moved.rounds
            assert max(run.in_flight, default=0) <= limit, bucket
            assert sum(run.in_flight) >= (run.moved.bytes_sent if network else 0)


def weights_only() -> tuple[bool, bool]:
    """True if the weights arrived, and whether the moments stayed as they were."""
    case = cases()["zero 2, tp 2 to zero 3, tp 4, deep"]
    growth = case.growth.with_kinds("fp32")
    rank = dist.get_rank()
    state = random_state(case.source.plan)
    mine = empty_storage(case.target, rank)
    source = ShardedState(case.source, storage_of(case.source, state, rank))
    exchange(source, growth, ShardedState(case.target, mine))
    expected = storage_of(case.target, grown(state, growth, case.target.plan), rank)
    arrived = all(torch.equal(mine[n]["fp32"], expected[n]["fp32"]) for n in expected)
    before = empty_storage(case.target, rank)
    untouched = all(
        torch.equal(mine[name][kind].isnan(), before[name][kind].isnan())
        for name in mine
        for kind in ADAMW_KINDS[1:]
    )
    return arrived, untouched


@pytest.mark.dist
def test_only_the_kinds_of_the_map_move():
    assert run_ranks(WORLD, weights_only) == [(True, True)] * WORLD
