"""Every growth gives live, between ranks, what it gives from file to file."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.checkpoint.discovery import shard_name
from megagrow.config.growth import GrowthConfig
from megagrow.growth.operators import growth_map
from megagrow.parallel.sharding import ADAMW_KINDS, parameter_plan
from megagrow.reshard.dense import exchange_dense
from megagrow.reshard.exchange import ShardedState, exchange
from megagrow.reshard.fill import fill_new
from tests.helpers.checkpoint.written import differences, shards, write_checkpoint
from tests.helpers.reshard.definition import random_state, storage_of
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks
from tests.helpers.train.file_growths import (
    GROWTHS,
    base,
    grow,
    model_file,
    overrides,
    source_of,
)

WORLD = 4
LAYOUTS = [
    ((1, 4, 1, "all"), (3, 2, 2, "matrices")),
    ((3, 2, 2, "matrices"), (2, 4, 1, "all")),
    ((0, 4, 1, "all"), (1, 2, 2, "all")),
    ((2, 2, 2, "all"), (0, 2, 2, "matrices")),
    ((3, 4, 1, "all"), (3, 4, 1, "all")),
]
"""Before and after, on four ranks."""


def layouts_of(name: str) -> tuple[tuple, tuple]:
    return LAYOUTS[list(GROWTHS).index(name) % len(LAYOUTS)]


def live() -> dict[str, dict[str, torch.Tensor]]:
    """Return the state that this rank would save after each growth."""
    rank, found = dist.get_rank(), {}
    for name, (changes, options) in GROWTHS.items():
        before, after = layouts_of(name)
        small, large = source_of(name), base(**changes)
        state = random_state(parameter_plan(small, 1), seed=3)
        source, target = layout_of(small, *before), layout_of(large, *after)
        growth = growth_map(small, large, GrowthConfig(**options), "7/stage-1")
        zeros = {key: torch.zeros(spec.rows, spec.cols) for key, spec in target.plan.items()}
        nothing = {key: dict.fromkeys(ADAMW_KINDS, values) for key, values in zeros.items()}
        sides = (
            ShardedState(source, storage_of(source, state, rank)),
            ShardedState(target, storage_of(target, nothing, rank)),
        )
        fill_new(growth, target, rank, sides[1].storage)
        exchange(sides[0], growth, sides[1])
        exchange_dense(sides[0], growth, sides[1])
        found[name] = {
            f"{key}.{kind}": values
            for key, kinds in sides[1].storage.items()
            if target.writes(key, rank)
            for kind, values in kinds.items()
        }
    return found


@pytest.fixture(scope="module")
def grown_live() -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_ranks(WORLD, live)


@pytest.mark.dist
@pytest.mark.parametrize("name", GROWTHS)
def test_live_and_file_to_file_are_one(grown_live, tmp_path: Path, name):
    changes, options = GROWTHS[name]
    before, (zero, dp, tp, decay) = layouts_of(name)
    source = source_of(name)
    state = random_state(parameter_plan(source, 1), seed=3)
    write_checkpoint(tmp_path / "in", source, layout_of(source, *before), state)
    grow(
        source=tmp_path / "in",
        out=tmp_path / "out",
        to=model_file(tmp_path / "model.yaml", changes),
        overrides=overrides(options),
        zero_stage=zero,
        dp=dp,
        tp=tp,
        weight_decay_on=decay,
    )
    wanted = {shard_name(rank): found[name] for rank, found in enumerate(grown_live)}
    wanted = {file: tensors for file, tensors in wanted.items() if tensors}
    tolerance = 1e-6 if name == "isometric" else 0.0
    assert differences(shards(tmp_path / "out"), wanted, tolerance) == []
