"""Saved state is loaded bit for bit, into the same layout and into any other."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.checkpoint.manifest import describe_layout
from megagrow.parallel.sharding import ADAMW_KINDS
from megagrow.train.stage import build_stage
from tests.helpers.checkpoint.saving import (
    ENVIRONMENT,
    MODEL,
    RUN,
    manifest_of,
    save_checkpoint,
    save_random,
)
from tests.helpers.checkpoint.written import record_of
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.definition import empty_storage, random_state, same, storage_of
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import full_tensors, make_run
from tests.helpers.spawn import run_ranks

WORLD = 4
LAYOUTS = {
    f"zero{zero} dp{dp} tp{tp}": layout_of(MODEL, zero, dp, tp, decay)
    for zero, dp, tp, decay in (
        (0, 4, 1, "all"),
        (0, 1, 4, "all"),
        (1, 2, 2, "matrices"),
        (2, 4, 1, "all"),
        (3, 2, 2, "all"),
        (3, 4, 1, "matrices"),
    )
}


def save_and_load_all(folder: Path) -> list[str]:
    """Every layout's checkpoint loaded into every layout; the pairs that differ by a bit."""
    rank, wrong = dist.get_rank(), []
    for step, (before, saved) in enumerate(LAYOUTS.items()):
        save_random(folder / before, step, saved)
        with captured_logs() as messages:
            path, manifest = newest_valid_on_all_ranks(folder / before)
        wrong += messages
        assert manifest.read_layout() == saved
        state = random_state(saved.plan, seed=step)
        for after, layout in LAYOUTS.items():
            mine = empty_storage(layout, rank)
            load_storage(path, manifest, layout, mine)
            if not same(mine, storage_of(layout, state, rank)):
                wrong.append(f"{before} -> {after}")
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reload")
    return folder, run_ranks(WORLD, save_and_load_all, folder)


@pytest.mark.dist
def test_every_layout_loads_every_layout(saved):
    assert saved[1] == [[]] * WORLD


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_number_is_on_the_disk_once(saved, name):
    path = saved[0] / name / f"step-{list(LAYOUTS).index(name):09d}"
    elements = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (not a mapping)
                tensor = shard.get_tensor(key)
                assert tensor.dtype == torch.float32
                elements += tensor.numel()
    layout = LAYOUTS[name]
    assert elements == len(ADAMW_KINDS) * sum(
        spec.slice_numel(layout.tp) * (1 if spec.tp_dim is None else layout.tp)
        for spec in layout.plan.values()
    )


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_manifest_says_all_the_rest(saved, name):
    path = saved[0] / name / f"step-{list(LAYOUTS).index(name):09d}"
    found = json.loads((path / "manifest.json").read_text())
    assert found["run"] == RUN and found["environment"] == ENVIRONMENT
    assert found["adam_step"] == 11 and found["model"] == MODEL.model_dump()
    files = {file.name: record_of(file).to_json() for file in path.glob("*.safetensors")}
    assert found["files"] == files and files
    assert {file.name for file in path.iterdir()} == {"manifest.json", *files}


def on_fewer_ranks(folder: Path) -> list[bool]:
    """Loads what four ranks saved into the layouts of one."""
    out = []
    for step, name in enumerate(LAYOUTS):
        path, manifest = newest_valid_on_all_ranks(folder / name)
        layout = layout_of(MODEL, step % 4, 1, 1)
        mine = empty_storage(layout, 0)
        load_storage(path, manifest, layout, mine)
        state = random_state(layout.plan, seed=step)
        out.append(same(mine, storage_of(layout, state, 0)))
    return out


@pytest.mark.dist
def test_one_rank_loads_what_four_saved(saved):
    assert run_ranks(1, on_fewer_ranks, saved[0]) == [[True] * len(LAYOUTS)]


def through_engines(folder: Path) -> list[tuple[bool, int]]:
    """Real engines: the state of one saved, and loaded into another of another layout."""
    grids = [(1, 1), (3, 2), (0, 1), (2, 2), (1, 1)]
    stages = [{"tokens": 64, "parallel": {"zero_stage": z, "tensor_model_parallel_size": t}}
              for z, t in grids]  # fmt: skip
    out, before = [], None
    for index, stage in enumerate(stages):
        run = make_run(folder, [stage])
        built = build_stage(run, 0, torch.device("cpu"))
        storage, layout = built.engine.storage(), built.layout
        if before is None:
            state = random_state(layout.plan, seed=5)
            for name, kinds in storage_of(layout, state, dist.get_rank()).items():
                for kind, values in kinds.items():
                    storage[name][kind].copy_(values)
            built.engine.ready(adam_step=5)
        else:
            path, manifest = newest_valid_on_all_ranks(folder / "engines")
            load_storage(path, manifest, layout, storage)
            built.engine.ready(manifest.adam_step)
        tensors = full_tensors(layout, built.engine.storage())
        out.append((same(tensors, before or tensors), built.engine.adam_step))
        before = tensors
        make = manifest_of(layout, built.engine.adam_step, built.config.model)
        assert make({}).layout == describe_layout(layout)
        save_checkpoint(folder / "engines", index, layout, built.engine.storage(), make)
        built.release()
    return out


@pytest.mark.dist
def test_engines_hold_what_was_loaded(tmp_path):
    make_run(tmp_path, [{"tokens": 64}])  # the corpus, written once
    for found in run_ranks(2, through_engines, tmp_path):
        assert found == [(True, 5)] * 5
