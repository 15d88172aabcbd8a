"""The same seed and data give the same losses, however the run is spread over ranks."""

import itertools

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, STEP_TOKENS, full_tensors, grow_live, make_run, parallel_of
from tests.helpers.spawn import run_ranks
from tests.helpers.train.starting import losses_of, start

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2))
"""(data parallel, tensor parallel)"""

DEEP = MODEL | {"num_hidden_layers": 6}
"""Three times the layers: two copies in a row, and alternating ones, would be something else."""
BASE_STEPS, GROWN_STEPS = 5, 10


def plain_layouts(world: int) -> list[dict]:
    """Every ZeRO stage on every grid of this many ranks."""
    grids = [tp for dp, tp in GRIDS if dp * tp == world]
    return [parallel_of(zero, tp) for zero, tp in itertools.product(STAGES, grids)]


def layouts_of(world: int) -> list[dict]:
    """The plain layouts, and sequence parallelism and activation checkpointing on some of them, at
    1 and at 4 ranks."""
    if world == 2:
        return plain_layouts(2)
    if world == 1:
        return [
            *plain_layouts(1),
            parallel_of(0, 1, recompute="full"),
            parallel_of(3, 1, recompute="selective"),
        ]
    options = ((1, True, "none"), (3, True, "full"), (2, False, "full"), (0, True, "selective"))
    return plain_layouts(world) + [parallel_of(zero, 2, *option) for zero, *option in options]


def plain_losses(runs: list[RunConfig]) -> list[list[float]]:
    out = []
    for run in runs:
        stage = start(run)
        out.append(losses_of(run, stage, RunState())[0])
        stage.release()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


def one_stage(folder, parallel: dict) -> RunConfig:
    return make_run(folder, [{"tokens": 20 * STEP_TOKENS, "parallel": parallel}])


@pytest.fixture(scope="module")
def reference(folder) -> list[float]:
    """One process, no ZeRO, no options."""
    return run_ranks(1, plain_losses, [one_stage(folder, parallel_of(0, 1))])[0][0]


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 4])
def test_twenty_steps_give_the_same_losses_in_every_layout(folder, reference, world):
    layouts = layouts_of(world)
    found = run_ranks(world, plain_losses, [one_stage(folder, parallel) for parallel in layouts])
    assert reference[-2] < reference[0] - 0.5, "nothing was learned: the test would prove nothing"
    for rank in found:
        for parallel, losses in zip(layouts, rank, strict=True):
            assert losses == pytest.approx(reference, rel=1e-5), parallel


def two_stages(folder, before: dict, after: dict) -> RunConfig:
    return make_run(
        folder,
        [
            {"tokens": BASE_STEPS * STEP_TOKENS, "parallel": before},
            {
                "model": DEEP,
                "tokens": GROWN_STEPS * STEP_TOKENS,
                "parallel": after,
                "growth": {"operator": "direct_depth", "optimizer_state": "transport"},
            },
        ],
    )


def grown(runs: list[RunConfig]) -> list[tuple[dict, dict, int, list[float]]]:
    """Per run: all logical tensors before and after the growth, Adam's step, later losses."""
    out = []
    for run in runs:
        stage = start(run)
        _, state = losses_of(run, stage, RunState())
        before = full_tensors(stage.layout, stage.engine.storage())
        before = {name: {k: v.clone() for k, v in kinds.items()} for name, kinds in before.items()}
        stage, report = grow_live(run, stage)
        after = full_tensors(stage.layout, stage.engine.storage())
        after = {name: {k: v.clone() for k, v in kinds.items()} for name, kinds in after.items()}
        step = stage.engine.adam_step
        losses, _ = losses_of(run, stage, state.after_growth(report.layers))
        stage.release()
        out.append((before, after, step, losses) if stage.topology.rank == 0 else losses)
    return out


def stacked(before: dict) -> dict:
    """The definition of Gstack on whole tensors: target layer i is source layer i mod l."""
    layers = MODEL["num_hidden_layers"]
    after = {}
    for name, kinds in before.items():
        if ".layers." not in name:
            after[name] = kinds
            continue
        head, _, tail = name.replace("model.layers.", "").partition(".")
        for copy in range(DEEP["num_hidden_layers"] // layers):
            after[f"model.layers.{copy * layers + int(head)}.{tail}"] = kinds
    return after


def check_growth(found: list, changes: list, reference: list[float]) -> None:
    for change, (before, after, step, losses) in zip(changes, found[0], strict=True):
        expected = stacked(before)
        assert after.keys() == expected.keys()
        for name, kinds in expected.items():
            for kind, tensor in kinds.items():
                assert torch.equal(after[name][kind], tensor), (change, name, kind)
        assert step == BASE_STEPS
        assert losses == pytest.approx(reference, rel=1e-5), change


@pytest.fixture(scope="module")
def grown_reference(folder) -> list[float]:
    run = two_stages(folder, parallel_of(0, 1), parallel_of(0, 1))
    return run_ranks(1, grown, [run])[0][0][3]


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 4])
def test_live_growth_is_a_plain_stack_in_every_layout(folder, grown_reference, world):
    layouts = plain_layouts(world) if world < 4 else layouts_of(world)
    changes = [(parallel, parallel) for parallel in layouts]
    found = run_ranks(world, grown, [two_stages(folder, *change) for change in changes])
    check_growth(found, changes, grown_reference)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_growth_may_change_the_layout(folder, grown_reference, world):
    changes = [
        (parallel_of(2, 1), parallel_of(3, 2)),
        (parallel_of(3, 2), parallel_of(1, 1)),
        (parallel_of(0, 2), parallel_of(2, 1)),
        (parallel_of(1, 1), parallel_of(0, 2, sequence_parallel=True)),
    ]
    found = run_ranks(world, grown, [two_stages(folder, *change) for change in changes])
    check_growth(found, changes, grown_reference)
