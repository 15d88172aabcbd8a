"""Stages with other data, sequences, positions and schedules: exact resumes, in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import steps_left
from megagrow.run import train
from tests.helpers.jobs import records
from tests.helpers.run.stopping import last_state, stopped_at
from tests.helpers.runs import MODEL, make_run, write_corpus
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


def test_stages_resume_exactly(tmp_path: Path) -> None:
    run_ranks(1, check, tmp_path)
