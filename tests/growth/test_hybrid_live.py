"""Growth of Samba hybrids between ranks, between files and in a run: bit-equal to full tensors."""

from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.growth.map_checks import check_map
from megagrow.offline.convert import export_universal, import_universal
from megagrow.offline.request import Request
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.exchange import ShardedState, exchange
from megagrow.reshard.fill import fill_initial, fill_new
from megagrow.train.growth_event.run_growths import stage_growth
from megagrow.train.stage import Stage, build_stage
from tests.helpers.checkpoint.written import (
    differences,
    expected_shards,
    shards,
    write_checkpoint,
)
from tests.helpers.growth.cases import Case, case, times
from tests.helpers.model.samba_reference import samba
from tests.helpers.reshard.definition import (
    State,
    grown,
    random_state,
    same,
    storage_of,
)
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import STEP_TOKENS, full_tensors, grow_live, make_run, train_to_end
from tests.helpers.spawn import run_ranks
from tests.helpers.train.file_growths import grow, overrides

SOURCE = samba(vocab_size=101)
TRANSPORT = {"optimizer_state": "transport"}
STACK = case(SOURCE, {"num_hidden_layers": 12}, operator="direct_depth", **TRANSPORT)
DOUBLE = times(SOURCE, 2, 2, 2) | {"mamba_d_inner": 48}
WIDE = case(SOURCE, DOUBLE, operator="direct_width", **TRANSPORT)
ZERO = case(SOURCE, {"mamba_d_inner": 40}, operator="zero_width", **TRANSPORT)
GROWTHS = {"stack": STACK, "width": WIDE, "new channels": ZERO}
GRIDS = ((0, 4), (1, 2), (3, 1), (2, 4), (3, 2))
"""ZeRO stage and tensor-parallel size of four ranks; each pair is before and after a growth."""

WORLD = 4


def state_of(config: ModelConfig) -> State:
    return random_state(parameter_plan(config, 1), seed=3)


def stacked(state: State) -> State:
    """Return the layers repeated in order, and all other tensors."""
    found = {}
    for name in parameter_plan(STACK.target, 1):
        head, _, tail = name.partition("layers.")
        layer, _, rest = tail.partition(".")
        source = f"{head}layers.{int(layer) % 4}.{rest}" if tail else name
        found[name] = state[source]
    return found


def expected_of(found: Case) -> State:
    return grown(state_of(SOURCE), found.growth, parameter_plan(found.target, 1))


def test_the_expected_stack_is_a_plain_stack() -> None:
    plain, found = stacked(state_of(SOURCE)), expected_of(STACK)
    assert plain.keys() == found.keys()
    for name, kinds in plain.items():
        assert all(torch.equal(found[name][kind], tensor) for kind, tensor in kinds.items()), name


def all_same(name: str, expected: State) -> list[bool]:
    """Grow between each pair of layouts; return whether this rank holds its share of the result."""
    found, state, rank, out = GROWTHS[name], state_of(SOURCE), dist.get_rank(), []
    for one, other in pairwise(GRIDS):
        before, after = (
            layout_of(model, zero, WORLD // tp, tp, "matrices")
            for model, (zero, tp) in ((found.source, one), (found.target, other))
        )
        check_map(found.growth, before.plan, after.plan)
        wanted = storage_of(after, expected, rank)
        mine = {n: {k: torch.zeros_like(t) for k, t in ks.items()} for n, ks in wanted.items()}
        fill_new(found.growth, after, rank, mine)
        source = ShardedState(before, storage_of(before, state, rank))
        exchange(source, found.growth, ShardedState(after, mine))
        out.append(same(mine, wanted))
    return out


@pytest.mark.dist
@pytest.mark.parametrize("name", GROWTHS)
def test_growth_between_layouts_is_that_of_whole_tensors(name: str) -> None:
    expected = expected_of(GROWTHS[name])
    for rank in run_ranks(WORLD, all_same, name, expected):
        assert rank == [True] * (len(GRIDS) - 1)


@pytest.mark.parametrize("name", GROWTHS)
def test_growth_of_files_is_that_of_whole_tensors(tmp_path: Path, name: str) -> None:
    found = GROWTHS[name]
    before = layout_of(SOURCE, 3, 2, 2, "matrices")
    write_checkpoint(tmp_path / "in", SOURCE, before, state_of(SOURCE))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(found.target.model_dump()))
    options = {"operator": found.options.operator, **TRANSPORT}
    target = {"to": str(tmp_path / "model.yaml"), "overrides": overrides(options)}
    spread = {"zero_stage": 2, "dp": 1, "tp": 4, "weight_decay_on": "matrices"}
    grow(source=tmp_path / "in", out=tmp_path / "out", **target, **spread)
    wanted = expected_shards(layout_of(found.target, 2, 1, 4, "matrices"), expected_of(found))
    assert differences(shards(tmp_path / "out"), wanted) == []


def test_universal_checkpoints_of_a_hybrid_come_back(tmp_path: Path) -> None:
    state, quiet = state_of(SOURCE), Console(file=StringIO())
    write_checkpoint(tmp_path / "in", SOURCE, layout_of(SOURCE, 2, 3, 2), state)
    export_universal(tmp_path / "in", tmp_path / "out", quiet)
    (step,) = (tmp_path / "out").glob("global_step*/zero")
    for name in ("A_log", "D", "conv1d.weight", "dt_proj.bias"):
        key = f"model.layers.2.mamba.{name}"
        param = torch.load(step / key / "exp_avg_sq.pt", weights_only=True)["param"]
        assert torch.equal(param.view_as(state[key]["exp_avg_sq"]), state[key]["exp_avg_sq"])
    options: dict[str, Any] = {"to": None, "weight_decay_on": "all", "memory": "64MiB"}
    spread = {"zero_stage": 3, "dp": 1, "tp": 4}
    request = {"form": "checkpoint", "source": tmp_path / "out", "out": tmp_path / "back"}
    import_universal(Request(**request, **options, **spread), quiet)
    wanted = expected_shards(layout_of(SOURCE, 3, 1, 4), state)
    assert differences(shards(tmp_path / "back"), wanted) == []


def run_of(folder: Path, target: ModelConfig, operator: str) -> RunConfig:
    """Return a run that trains under ZeRO 2 and grows to ZeRO 3 and TP 2."""
    return make_run(
        folder,
        [
            {
                "model": SOURCE.model_dump(),
                "tokens": 2 * STEP_TOKENS,
                "parallel": {"zero_stage": 2},
            },
            {
                "model": target.model_dump(),
                "tokens": STEP_TOKENS,
                "parallel": {"zero_stage": 3, "tensor_model_parallel_size": 2},
                "growth": {"operator": operator, **TRANSPORT},
            },
        ],
    )


def snapshot(stage: Stage) -> State:
    found = full_tensors(stage.layout, stage.engine.storage())
    return {name: {kind: t.clone() for kind, t in kinds.items()} for name, kinds in found.items()}


def grown_in_a_run(run: RunConfig) -> tuple[State, State, bool]:
    """Return the plain result and the engine's state after a growth; whether it trains on."""
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    state = train_to_end(run, stage)
    target = parameter_plan(run.stages[1].model, 1)
    expected = grown(snapshot(stage), stage_growth(run, 1), target)
    stage, report = grow_live(run, stage)
    after = snapshot(stage)
    train_to_end(run, stage, state.after_growth(report.layers))
    trained = snapshot(stage)
    kinds = ((name, kind) for name, kinds in after.items() for kind in kinds)
    moves = all(not torch.equal(after[name][kind], trained[name][kind]) for name, kind in kinds)
    return expected, after, moves


@pytest.mark.dist
@pytest.mark.parametrize("name", ["stack", "width"])
def test_the_engine_holds_the_plain_result(tmp_path: Path, name: str) -> None:
    found = GROWTHS[name]
    run = run_of(tmp_path, found.target, found.options.operator[0])
    for expected, after, moves in run_ranks(2, grown_in_a_run, run):
        assert expected.keys() == after.keys()
        for parameter, kinds in expected.items():
            for kind, tensor in kinds.items():
                assert tensor.any() or kind == "fp32", (parameter, kind)
                assert torch.equal(after[parameter][kind], tensor), (parameter, kind)
        assert moves
