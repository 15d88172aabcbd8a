"""Every operator, live on four ranks and in every kind of layout, makes what whole tensors make."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megagrow.config.schema import ModelConfig
from megagrow.growth.map_checks import check_map
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.dense import exchange_dense
from megagrow.reshard.exchange import ShardedState, exchange
from megagrow.reshard.fill import fill_new
from megagrow.reshard.layout import Layout
from tests.helpers.growth.cases import Case
from tests.helpers.reshard.definition import State, random_state, storage_of
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks
from tools.docs.operators.catalogue import CATALOGUE as CASES
from tools.docs.operators.dense_growth import grown

WORLD = 4
GRIDS = ((0, 4), (1, 2), (2, 1), (3, 2), (2, 4), (3, 1))
"""ZeRO stage and tensor-parallel size, of four ranks; each is a source and a target in turn."""

PAIRS = tuple(itertools.pairwise((*GRIDS, GRIDS[0])))


def layout(config: ModelConfig, grid: tuple[int, int]) -> Layout:
    zero, tp = grid
    return layout_of(config, zero, WORLD // tp, tp, "matrices")


def off(grown_case: Case, whole: tuple[State, State], before: Layout, after: Layout) -> float:
    """The largest difference of what this rank holds from its share of the plain result, relative
    to the largest number of the tensor if that is above 1; `whole` is the state of the source and
    the plain result."""
    rank, growth = dist.get_rank(), grown_case.growth
    check_map(growth, before.plan, after.plan)
    expected = storage_of(after, whole[1], rank)
    mine = {n: {k: torch.zeros_like(t) for k, t in ks.items()} for n, ks in expected.items()}
    source, target = (
        ShardedState(before, storage_of(before, whole[0], rank)),
        ShardedState(after, mine),
    )
    fill_new(growth, after, rank, mine)
    exchange(source, growth, target)
    exchange_dense(source, growth, target)
    differences = [
        ((mine[name][kind] - t).abs().max() / t.abs().max().clamp(min=1)).item()
        for name in expected
        for kind, t in expected[name].items()
    ]
    return max(differences, default=0.0)


def whole_states(grown_case: Case) -> tuple[State, State]:
    state = random_state(parameter_plan(grown_case.source, 1))
    return state, grown(state, grown_case.growth, grown_case.target)


def all_off(states: dict[str, tuple[State, State]]) -> dict[str, float]:
    """For every growth the largest difference over all pairs of layouts."""
    found = {}
    for name, grown_case in CASES.items():
        pairs = [
            off(
                grown_case,
                states[name],
                layout(grown_case.source, one),
                layout(grown_case.target, other),
            )
            for one, other in PAIRS
        ]
        found[name] = max(pairs)
    return found


@pytest.fixture(scope="module")
def differences() -> list[dict[str, float]]:
    states = {name: whole_states(case) for name, case in CASES.items()}
    return run_ranks(WORLD, all_off, states, timeout=290)


def test_pairs_of_layouts_cover_every_stage_and_change() -> None:
    assert {zero for grid, _ in PAIRS for zero in grid[:1]} == {0, 1, 2, 3}
    assert {tp for _, (_, tp) in PAIRS} == {1, 2, 4}
    assert any(one[0] != other[0] and one[1] != other[1] for one, other in PAIRS)


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_live_growth_makes_what_whole_tensors_make(name: str, differences: list) -> None:
    """To the bit where numbers are only picked and scaled; where they are drawn or mixed, to the
    rounding of sums."""
    summed = name == "isometric" or bool(CASES[name].growth.fills)
    for rank in differences:
        assert rank[name] <= (1e-6 if summed else 0.0), name
