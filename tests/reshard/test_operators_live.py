"""Every operator, live on four ranks and in every kind of layout, makes what whole tensors make."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagrow.config.growth import OperatorName
from megagrow.config.schema import ModelConfig
from megagrow.growth.check import check_map
from megagrow.growth.operators import OPERATORS
from megagrow.parallel.plan import parameter_plan
from megagrow.reshard.dense import exchange_dense
from megagrow.reshard.exchange import Side, exchange
from megagrow.reshard.fill import fill_new
from megagrow.reshard.layout import Layout
from tests.growth.cases import Case, case, times
from tests.growth.whole import grown
from tests.reshard.definition import random_state, storage_of
from tests.reshard.models import layout_of
from tests.spawn import run_ranks

WORLD = 4
SOURCE = ModelConfig(
    num_hidden_layers=2,
    hidden_size=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=2,
    intermediate_size=8,
    vocab_size=11,
    rms_norm_eps=1e-2,
)
"""Its vocabulary is padded on 2 and on 4 tensor-parallel ranks."""

DEEPER: dict[str, Any] = {"num_hidden_layers": 4}
TWICE = times(SOURCE, 2, 2, 2)
ODD = TWICE | {"hidden_size": 17, "intermediate_size": 12}
"""The residual stream grows to no multiple."""

SIZES: dict[OperatorName, dict[str, Any]] = {
    "zero_width": ODD,
    "random_width": ODD,
    "lemon": ODD,
    "sparkling": ODD,
    "isometric": {"hidden_size": 17},
    "head_dim": {"head_dim": 6},
    "vocabulary": {"vocab_size": 14},
    "lidas": {"num_hidden_layers": 3},
}
"""To what each operator grows the source, where that is not twice its width or depth."""

GRIDS = ((0, 4), (1, 2), (2, 1), (3, 2), (2, 4), (3, 1))
"""ZeRO stage and tensor-parallel size, of four ranks; each is a source and a target in turn."""

PAIRS = tuple(itertools.pairwise((*GRIDS, GRIDS[0])))


def cases_of(name: OperatorName) -> Case:
    operator = OPERATORS[name]
    sizes = SIZES.get(name, TWICE if operator.wider else DEEPER)
    return case(SOURCE, sizes, operator=name)


CASES = {name: cases_of(name) for name in OPERATORS} | {
    "stack and widen": case(SOURCE, TWICE | DEEPER, operator=["direct_depth", "direct_width"]),
    "uneven, noisy, tiled": case(
        *(SOURCE, TWICE), operator="direct_width", split="uneven", noise=1.0, order="tiled"
    ),
    "asymmetric": case(SOURCE, TWICE, operator="direct_width", optimizer_state="asymmetric"),
    "keep_v": case(SOURCE, DEEPER, operator="direct_depth", optimizer_state="keep_v"),
    "reset": case(SOURCE, DEEPER, operator="direct_depth", optimizer_state="reset"),
    "mixing": case(SOURCE, DEEPER, operator="direct_depth", mixing_noise=0.2),
    "literal zero": case(SOURCE, {"hidden_size": 17}, operator="zero_width", literal=True),
}


def layout(config: ModelConfig, grid: tuple[int, int]) -> Layout:
    zero, tp = grid
    return layout_of(config, zero, WORLD // tp, tp, "matrices")


def off(grown_case: Case, before: Layout, after: Layout) -> float:
    """The largest difference of what this rank holds from its share of the plain result, relative
    to the largest number of the tensor if that is above 1."""
    rank, growth = dist.get_rank(), grown_case.growth
    check_map(growth, before.plan, after.plan)
    state = random_state(parameter_plan(grown_case.source, 1))
    expected = storage_of(after, grown(state, growth, grown_case.target), rank)
    mine = {n: {k: torch.zeros_like(t) for k, t in ks.items()} for n, ks in expected.items()}
    source, target = Side(before, storage_of(before, state, rank)), Side(after, mine)
    fill_new(growth, after, rank, mine)
    exchange(source, growth, target)
    exchange_dense(source, growth, target)
    differences = [
        ((mine[name][kind] - t).abs().max() / t.abs().max().clamp(min=1)).item()
        for name in expected
        for kind, t in expected[name].items()
    ]
    return max(differences, default=0.0)


def all_off() -> dict[str, float]:
    """For every growth the largest difference over all pairs of layouts."""
    found = {}
    for name, grown_case in CASES.items():
        pairs = [
            off(grown_case, layout(grown_case.source, one), layout(grown_case.target, other))
            for one, other in PAIRS
        ]
        found[name] = max(pairs)
    return found


@pytest.fixture(scope="module")
def differences() -> list[dict[str, float]]:
    return run_ranks(WORLD, all_off, timeout=290)


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
