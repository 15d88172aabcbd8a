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
STEPS = (5, 10)
"""Steps before and after a growth."""
BF16_STEPS = (3, 3)

FP32 = (1e-5, 1e-5)
"""Relative tolerances of losses and of gradient norms, against one process."""
BF16 = (1e-3, 3e-2)
"""The same in bf16, against one process in fp32: measured differences reach 5e-4 and 1.1e-2."""


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


def check_losses(
    found: list, cases: list, reference: list[float], tolerances: tuple[float, float] = FP32
) -> None:
    """Compare losses and gradient norms, which alternate, with those of one process."""
    for case, losses in zip(cases, found, strict=True):
        for kind, tolerance in enumerate(tolerances):
            assert losses[kind::2] == pytest.approx(reference[kind::2], rel=tolerance), case


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 4])
def test_twenty_steps_give_the_same_losses_in_every_layout(folder, reference, world):
    layouts = layouts_of(world)
    found = run_ranks(world, plain_losses, [one_stage(folder, parallel) for parallel in layouts])
    assert reference[-2] < reference[0] - 0.5, "nothing was learned: the test would prove nothing"
    for rank in found:
        check_losses(rank, layouts, reference)


def two_stages(
    folder, before: dict, after: dict, steps: tuple[int, int] = STEPS, precision: str = "fp32"
) -> RunConfig:
    return make_run(
        folder,
        [
            {"tokens": steps[0] * STEP_TOKENS, "parallel": before},
            {
                "model": DEEP,
                "tokens": steps[1] * STEP_TOKENS,
                "parallel": after,
                "growth": {"operator": "direct_depth", "optimizer_state": "transport"},
            },
        ],
        precision=precision,
    )


def grown(runs: list[RunConfig]) -> list[tuple[dict, dict, int, list[float]]]:
    """Per run: all logical tensors before and after the growth, Adam's step, all losses."""
    out = []
    for run in runs:
        stage = start(run)
        losses, state = losses_of(run, stage, RunState())
        before = full_tensors(stage.layout, stage.engine.storage())
        before = {name: {k: v.clone() for k, v in kinds.items()} for name, kinds in before.items()}
        stage, report = grow_live(run, stage)
        after = full_tensors(stage.layout, stage.engine.storage())
        after = {name: {k: v.clone() for k, v in kinds.items()} for name, kinds in after.items()}
        step = stage.engine.adam_step
        losses += losses_of(run, stage, state.after_growth(report.layers))[0]
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


def check_growth(found: list, changes: list, steps: tuple[int, int] = STEPS) -> None:
    """Compare the state of every tensor after a growth with the definition, to the bit."""
    for change, (before, after, step, _) in zip(changes, found[0], strict=True):
        expected = stacked(before)
        assert after.keys() == expected.keys()
        for name, kinds in expected.items():
            for kind, tensor in kinds.items():
                assert torch.equal(after[name][kind], tensor), (change, name, kind)
        assert step == steps[0]


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
    check_growth(found, changes)
    check_losses([losses for *_, losses in found[0]], changes, grown_reference)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_growth_may_change_the_layout(folder, grown_reference, world):
    changes = [
        (parallel_of(2, 1), parallel_of(3, 2)),
        (parallel_of(3, 2), parallel_of(1, 1)),
        (parallel_of(0, 2), parallel_of(2, 1)),
        (parallel_of(1, 1), parallel_of(0, 2, sequence_parallel=True)),
    ]
    if world == 4:
        context = {"context_parallel_size": 2}
        changes += [
            (parallel_of(2, 2) | context, parallel_of(3, 1) | {"context_parallel_size": 4}),
            (parallel_of(0, 1) | context | {"cp_comm_type": "a2a"}, parallel_of(1, 2) | context),
        ]
    found = run_ranks(world, grown, [two_stages(folder, *change) for change in changes])
    check_growth(found, changes)
    check_losses([losses for *_, losses in found[0]], changes, grown_reference)


@pytest.fixture(scope="module")
def bf16_reference(folder) -> list[float]:
    """The same run as in bf16, by one process in fp32."""
    run = two_stages(folder, parallel_of(0, 1), parallel_of(0, 1), BF16_STEPS)
    return run_ranks(1, grown, [run])[0][0][3]


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bf16_losses_and_growth_in_every_layout(folder, bf16_reference, world):
    """Every ZeRO stage; at 4 ranks data parallel and tensor parallel at once."""
    changes = [(parallel, parallel) for parallel in plain_layouts(world)]
    runs = [two_stages(folder, *change, BF16_STEPS, "bf16") for change in changes]
    found = run_ranks(world, grown, runs)
    check_growth(found, changes, BF16_STEPS)
    check_losses([losses for *_, losses in found[0]], changes, bf16_reference, BF16)
