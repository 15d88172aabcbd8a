"""Stages with other data, sequences, positions and schedules: exact resumes, in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import steps_left
from megagrow.reshard.fill import fill_initial
from megagrow.run import train
from megagrow.train.data_setup import open_inputs
from megagrow.train.stage import Stage, build_stage
from megagrow.train.state_check import fixed_loss
from megagrow.train.train_state import RunState
from tests.helpers.jobs import records
from tests.helpers.run.stopping import last_state, stopped_at
from tests.helpers.runs import (
    MODEL,
    STEP_TOKENS,
    full_tensors,
    grow_live,
    make_run,
    parallel_of,
    train_to_end,
    write_corpus,
)
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

TOKENS = 5 * 64
DEEP = MODEL | {"num_hidden_layers": 4}
LONG = {"sequence_length": 32}


def staged_run(folder: Path, **changes: Any) -> RunConfig:
    """Growth; other data; longer sequences with another rope_theta; annealing by a new schedule."""
    write_corpus(folder / "other", documents=20, seed=3)
    mixture = {"train": [folder / "other", folder / "train"]}
    far = DEEP | {"rope_theta": 5e5}
    schedule = {"type": "linear", "restart": True}
    stages: list[dict[str, Any]] = [
        {},
        {"model": DEEP, "growth": {"lr_schedule": "continue"}},
        {"model": DEEP, "data": mixture, "parallel": {"zero_stage": 2}},
        {"model": far, "data": mixture | LONG, "batch": {"global_batch_size": 2}},
        {"model": far, "data": LONG | {"train": folder / "other"}, "schedule": schedule},
    ]
    stages[3]["batch"] = stages[4]["batch"] = {"global_batch_size": 2, "micro_batch_size": 1}
    filled = [{"tokens": TOKENS, **stage} for stage in stages]
    return make_run(folder, filled, checkpoint={"interval": 3}, **changes)


def check(folder: Path) -> None:
    dist.destroy_process_group()  # `train` makes its own
    run = staged_run(folder)
    train(run)
    expected = last_state(run)
    begun = records(run, "stage", ("step", "stage", "loss_before", "loss_after"))
    assert [(step, stage) for step, stage, _, _ in begun] == [(10, 2), (15, 3), (20, 4)]
    same = {stage: before == after for _, stage, before, after in begun}
    assert same == {2: True, 3: False, 4: True}
    rates = dict(records(run, "train", ("step", "lr")))
    assert rates[20] < rates[21] == 1e-2, "the schedule starts again"
    kept = [path.name for path in list_checkpoints(run.output_dir / "checkpoints")]
    assert kept[0] == "step-000000005", "before the growth"
    for index, steps in enumerate(([3, 12], [5, 10, 18], [15, 20, 21])):
        parts = run.model_copy(update={"output_dir": folder / f"parts-{index}"})
        for step in steps:
            assert stopped_at(parts, step)
        train(parts)
        assert last_state(parts) == expected, steps
    assert steps_left(run) == 25


def check_split(folder: Path) -> None:
    dist.destroy_process_group()
    growth = {
        "lr_schedule": "continue",
        "new_entries": {"warmup_steps": 6},
        "freeze_tokens": 3 * STEP_TOKENS,
    }
    base = {"tokens": 4 * STEP_TOKENS}
    grown = {"tokens": 8 * STEP_TOKENS, "model": DEEP, "growth": growth}
    begin = grown | {"tokens": 2 * STEP_TOKENS}
    rest = {"tokens": 6 * STEP_TOKENS, "model": DEEP}
    trained = []
    for name, stages in (("whole", [base, grown]), ("split", [base, begin, rest])):
        run = make_run(folder, stages, output_dir=folder / name)
        train(run)
        trained.append(records(run, "train", ("step", "loss", "lr", "grad_norm")))
    assert trained[0] == trained[1] and len(trained[0]) == 12


def test_a_stage_without_growth_only_continues_a_grown_one(tmp_path: Path) -> None:
    run_ranks(1, check_split, tmp_path)


def test_stages_resume_exactly(tmp_path: Path) -> None:
    run_ranks(1, check, tmp_path)


LAYOUTS = [(0, 1), (3, 2), (1, 1), (2, 2)]
"""ZeRO stage and tensor-parallel size of each stage on four ranks."""


def check_layouts(folder: Path) -> None:
    """The state is bit-equal in every layout, and the losses are those of one layout."""
    losses: list[list[float]] = []
    for layouts in (LAYOUTS, [(1, 1)] * len(LAYOUTS)):
        stages = [{"tokens": 4 * 64, "parallel": parallel_of(*layout)} for layout in layouts]
        run = make_run(folder / str(len(losses)), stages)
        stage = build_stage(run, 0, torch.device("cpu"))
        fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
        stage.engine.ready(0)
        inputs, state, found = open_inputs(run), RunState(), []
        for index in range(len(stages)):
            if index:
                before, step = full_state(stage), stage.engine.adam_step
                stage, report = grow_live(run, stage)
                assert report.operator == () and stage.engine.adam_step == step > 0
                after = full_state(stage)
                assert all(torch.equal(before[name], after[name]) for name in before)
                assert before.keys() == after.keys()
                state = state.after_growth(report.layers)
            state = train_to_end(run, stage, state)
            found.append(fixed_loss(run, stage, 0, inputs.stages[index].fixed))
        stage.release()
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def full_state(stage: Stage) -> dict[tuple[str, str], torch.Tensor]:
    """Return every tensor of the state on all ranks, by name and kind."""
    tensors = full_tensors(stage.layout, stage.engine.storage())
    return {(name, kind): each for name, kinds in tensors.items() for kind, each in kinds.items()}


def test_a_changed_layout_moves_the_state_unchanged(tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name / "train")
        write_corpus(tmp_path / name / "validation", documents=10, seed=1)
    run_ranks(4, check_layouts, tmp_path)
