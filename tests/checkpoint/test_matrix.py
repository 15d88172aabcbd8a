"""The matrix: a checkpoint of every layout is loaded into every other one.

Twenty layouts: ZeRO 0 to 3 on five grids of ranks. All pairs by arithmetic alone, each rank of the
target in turn; and real engines for each layout as a source and as a target, which then go on
training as if nothing had happened.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.schema import RunConfig
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.checkpoint.saving import manifest_of, save_checkpoint
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import empty_storage, random_state, same, storage_of
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import STEP_TOKENS, make_run
from tests.helpers.spawn import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
"""(data parallel, tensor parallel)"""

CASES = [(zero, dp, tp) for zero, (dp, tp) in itertools.product(range(4), GRIDS)]
MODEL = tiny(num_hidden_layers=1, num_key_value_heads=2)
"""An odd vocabulary, padded where tensor parallelism splits it, and GQA."""

SAVED_STEP, STEPS = 3, 8
BF16_CLOSE = 5e-4
"""Relative tolerance of losses in bf16 after a change of the layout; measured: up to 1.2e-4."""
COMMON_SOURCE, COMMON_TARGET = (2, 2, 2), (3, 2, 1)


def name_of(case: tuple[int, int, int]) -> str:
    return "zero{} dp{} tp{}".format(*case)


def load_all_pairs(folder: Path) -> list[str]:
    """Every checkpoint into every layout, as each of its ranks; the pairs that differ by a bit."""
    wrong = []
    state = random_state(layout_of(MODEL, 0, 1, 1).plan, seed=3)
    for source, target in itertools.product(CASES, CASES):
        path = folder / name_of(source)
        if not path.exists():
            write_checkpoint(path, MODEL, layout_of(MODEL, *source, "matrices"), state)
        layout = layout_of(MODEL, *target)
        for rank in range(layout.world_size):
            mine = empty_storage(layout, rank)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "get_rank", lambda rank=rank: rank)
                load_storage(path, read_manifest(path), layout, mine)
            if not same(mine, storage_of(layout, state, rank)):
                wrong.append(f"{name_of(source)} -> {name_of(target)}, rank {rank}")
    return wrong


def test_all_pairs_to_the_bit(tmp_path: Path) -> None:
    assert run_ranks(1, load_all_pairs, tmp_path) == [[]]


def run_of(folder: Path, case: tuple[int, int, int], precision: str) -> RunConfig:
    parallel = {"zero_stage": case[0], "tensor_model_parallel_size": case[2]}
    stage = {"tokens": STEPS * STEP_TOKENS, "parallel": parallel}
    return make_run(folder, [stage], precision=precision)


def train(
    run: RunConfig, stage: Stage, state: RunState, until: int
) -> tuple[list[float], RunState]:
    """Trains up to a step: the losses, and the state then."""
    feed, stop, losses = StepFeed(open_inputs(run).train), StopSignal(), []
    while state.counters.step < until:
        event = advance(run, stage, state, feed, stop)
        assert isinstance(event, StepDone)
        losses.append(event.measure.loss)
        state = event.state
    return losses, state


def saved_by_engines(
    folder: Path, cases: list[tuple[int, int, int]], precision: str = "fp32"
) -> list[list[float]]:
    """Runs of these layouts, each saved in the middle; the losses after that."""
    out = []
    for case in cases:
        run = run_of(folder, case, precision)
        stage = build_stage(run, 0, torch.device("cpu"))
        fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
        stage.engine.ready(0)
        _, state = train(run, stage, RunState(), SAVED_STEP)
        storage = stage.engine.storage()
        make = manifest_of(stage.layout, SAVED_STEP, stage.config.model, run=state.as_json())
        save_checkpoint(folder / name_of(case), SAVED_STEP, stage.layout, storage, make)
        out.append(train(run, stage, state, STEPS)[0])
        stage.release()
    return out


def resumed_by_engines(
    folder: Path,
    pairs: list[tuple[tuple[int, int, int], tuple[int, int, int]]],
    precision: str = "fp32",
) -> list[list[float]]:
    """The losses of each target after it has loaded what its source saved."""
    out = []
    for source, target in pairs:
        run = run_of(folder, target, precision)
        found = newest_valid_on_all_ranks(folder / name_of(source))
        assert found is not None
        path, manifest = found
        stage = build_stage(run, 0, torch.device("cpu"))
        load_storage(path, manifest, stage.layout, stage.engine.storage())
        stage.engine.ready(manifest.adam_step)
        out.append(train(run, stage, RunState.from_json(manifest.run, {}), STEPS)[0])
        stage.release()
    return out


def of_world(cases: list, world: int) -> list:
    return [case for case in cases if case[-2] * case[-1] == world]


def test_engines_go_on_with_what_another_layout_saved(tmp_path: Path) -> None:
    losses = {}
    run_of(tmp_path, CASES[0], "fp32")  # the corpus, written once
    for world in (1, 2, 4):
        cases = of_world(CASES, world)
        found = run_ranks(world, saved_by_engines, tmp_path, cases)[0]
        losses |= dict(zip(cases, found, strict=True))
    undisturbed = losses[0, 1, 1]
    assert undisturbed[-1] < undisturbed[0] - 0.05, "nothing is learned: equal losses prove nothing"
    pairs = {(COMMON_SOURCE, case) for case in CASES} | {(case, COMMON_TARGET) for case in CASES}
    for world in (1, 2, 4):
        some = sorted(pair for pair in pairs if pair[1][1] * pair[1][2] == world)
        for pair, found in zip(
            some, run_ranks(world, resumed_by_engines, tmp_path, some)[0], strict=True
        ):
            assert found == pytest.approx(losses[pair[0]], rel=1e-5), pair
            assert found == pytest.approx(undisturbed, rel=1e-5), pair


def test_bf16_engines_resume_to_the_bit_and_in_other_layouts(tmp_path: Path) -> None:
    cases = [(1, 2, 1), (3, 1, 2)]
    run_of(tmp_path, cases[0], "bf16")  # the corpus, written once
    saved = run_ranks(2, saved_by_engines, tmp_path, cases, "bf16")[0]
    losses = dict(zip(cases, saved, strict=True))
    pairs = list(itertools.product(cases, [*cases, (0, 2, 1), (2, 1, 2)]))
    resumed = run_ranks(2, resumed_by_engines, tmp_path, pairs, "bf16")[0]
    for (source, target), found in zip(pairs, resumed, strict=True):
        if source == target:
            assert found == losses[source], source
        assert found == pytest.approx(losses[source], rel=BF16_CLOSE), (source, target)
