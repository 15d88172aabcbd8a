"""Random runs, stopped anywhere and resumed with a changed configuration, in one process."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import settled
from megagrow.errors import ConfigError
from megagrow.growth.mask_schedule import stage_masks
from megagrow.run import train
from megagrow.train.schedule import learning_rate
from tests.helpers.jobs import records, write_run
from tests.helpers.run.stopping import last_state, stopped_at
from tests.helpers.runs import MODEL, make_run
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

CASES, LENGTH = 5, 16
FREE = {
    "name": ["another"],
    "checkpoint.background": [True, False],
    "validation.interval": [2, 7],
    "logging.interval": [2, 3],
    "guards.hang_timeout": [50, "null"],
}
OF_REWINDS = {"checkpoint.interval": [2, 5], "checkpoint.keep_last": [1, 4]}
"""Keys that are recorded, because they affect a rewind; these runs have none."""
CONTRADICTORY = {
    "seed": [7],
    "data.sequence_length": [8],
    "data.reset_position_ids": ["true"],
    "data.train.0.weight": [2],
    "stages.0.model.rope_theta": [5e5],
    "stages.0.tokens": [16],
}
GROWTHS = [
    {"operator": "direct_depth", "lr_schedule": "continue"},
    {"operator": "zero_depth"},
    {"operator": "random_depth", "lr_schedule": "continue", "ramp_tokens": 96},
    {"operator": "direct_depth", "lr_schedule": "continue", "freeze_tokens": 64},
]


def random_run(folder: Path, chosen: random.Random) -> RunConfig:
    """Return a run of one to three stages with random batches, lengths, schedules and growths."""
    stages: list[dict[str, Any]] = []
    layers = 1
    for index in range(chosen.randint(1, 3)):
        batch = chosen.choice([1, 2, 3])
        stage: dict[str, Any] = {
            "tokens": chosen.randint(batch * LENGTH * 2, 200) if index < 2 else 100,
            "batch": {"global_batch_size": batch, "micro_batch_size": 1},
            "schedule": {
                "type": chosen.choice(["cosine", "wsd", "linear"]),
                "warmup_tokens": chosen.choice([1, 64]),
            },
        }
        if index:
            layers *= 2
            stage["growth"] = chosen.choice(GROWTHS)
            stage["tokens"] += 100
        stages.append(stage | {"model": MODEL | {"num_hidden_layers": layers}})
    validation = {"interval": 4, "tokens": 32}
    return make_run(folder, stages, checkpoint={"interval": 3}, validation=validation)


def with_changes(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    path = write_run(run.output_dir.with_suffix(".yaml"), run)
    return load_run(path, [f"{key}={value}" for key, value in changes.items()])


def check_case(folder: Path, seed: int) -> None:
    chosen = random.Random(seed)
    run = random_run(folder, chosen)
    train(run)
    expected = last_state(run)
    steps = records(run, "end", ["step"])[0][0]
    parts = run.model_copy(update={"output_dir": folder / "parts"})
    assert stopped_at(parts, chosen.randint(1, steps - 1))
    before = (parts.output_dir / "config.yaml").read_bytes()
    for key, values in CONTRADICTORY.items():
        contradictory = with_changes(parts, {key: values[0]})
        with pytest.raises(ConfigError) as error:
            train(contradictory)
        if dist.is_initialized():
            dist.destroy_process_group()
        place = f"stages.0.{key}" if key.startswith("data.") else key
        assert place in str(error.value) and f"--allow-change {place}" in str(error.value)
    assert (parts.output_dir / "config.yaml").read_bytes() == before
    values = FREE | OF_REWINDS
    keys = chosen.sample(sorted(values), 4)
    free = with_changes(parts, {key: chosen.choice(values[key]) for key in keys})
    for end in (".bin", ".idx"):
        shutil.copy(folder / f"train{end}", folder / f"moved{end}")
    train(with_changes(free, {"data.train.0.path": folder / "moved", "logging.interval": 1}))
    found = last_state(parts)
    assert found == expected, (seed, keys)
    assert len(list(parts.output_dir.glob("config-*.yaml"))) == 1
    recorded = records(parts, "config_change", ["changes"])
    found_keys = {change["key"] for (changes,) in recorded for change in changes}
    assert found_keys == {*keys} & {*OF_REWINDS}


def check_batches(folder: Path) -> None:
    """A new batch size changes the steps, not the budget, and is recorded."""
    stage = {"tokens": 20 * 4 * LENGTH, "schedule": {"warmup_tokens": 64}}
    for batch, steps in ((16, 10 + 3), (1, 10 + 40)):
        run = make_run(folder, [stage], output_dir=folder / f"batch-{batch}")
        assert stopped_at(run, 10)
        train(with_changes(run, {"stages.0.batch.global_batch_size": batch}))
        assert records(run, "end", ("step", "tokens"))[-1][0] == steps
        tokens = records(run, "end", ["tokens"])[-1][0]
        assert 0 <= tokens - stage["tokens"] < batch * LENGTH
        rates = [lr for (lr,) in records(run, "train", ["lr"])]
        assert rates[1:] == sorted(rates[1:], reverse=True), "the rate never jumps up"
        ((step, changes),) = records(run, "config_change", ("step", "changes"))
        key = "stages.0.batch.global_batch_size"
        change = {"key": key, "old": 4, "new": batch, "effect": "from now on"}
        assert (step, changes) == (10, [change])


def check_budgets(folder: Path) -> None:
    """A new batch size within a stage shifts neither budget, rates nor masks after a growth.

    Planned: 10 steps of 64 tokens in stage 0, which end at 640, and 11 in stage 1.
    """
    growth = {"operator": "random_depth", "lr_schedule": "continue"}
    schedule = {"schedule": {"warmup_tokens": 64}}
    later = {"model": MODEL | {"num_hidden_layers": 4}, "growth": growth, "at_tokens": 1300}
    stages = [{"tokens": 600, **schedule}, {"tokens": 660, **later, **schedule}]
    for stage, stop, batch, ends in (
        (0, 1, 36, [64 + 576, 640 + 11 * 64]),
        (0, 3, 5, [192 + 6 * 80, 672 + 10 * 64]),
        (1, 11, 5, [640, 640 + 64 + 8 * 80]),
    ):
        run = make_run(folder, stages, output_dir=folder / f"budget-{stage}-{batch}")
        assert stopped_at(run, stop)
        saved = [read_manifest(path) for path in list_checkpoints(run.output_dir / "checkpoints")]
        assert [each.scheduled for each in saved] == [True] * stage + [False]
        changed = with_changes(run, {f"stages.{stage}.batch.global_batch_size": batch})
        train(changed)
        ((changes,),) = records(run, "config_change", ["changes"])
        keys = [f"stages.{stage}.batch.global_batch_size"]
        keys += [] if ends[0] == 640 else ["stages.1.tokens"]
        assert [change["key"] for change in changes] == keys
        steps = records(run, "train", ("step", "stage", "tokens", "lr"))
        assert [max(end for _, at, end, _ in steps if at == index) for index in (0, 1)] == ends
        begin = 0
        for step, _, end, lr in steps:
            horizon = 1344 if step <= stop else ends[1]
            settings = run.stages[0].schedule, run.stages[0].optimizer
            assert lr == learning_rate(*settings, begin, end - begin, horizon), (batch, step)
            begin = end
        trained = ends[1] - ends[0]
        assert stage_masks(settled(changed, 1, trained, ends[:1]), 1, trained) is None


def check_all(folder: Path) -> None:
    dist.destroy_process_group()  # `train` makes its own
    check_batches(folder)
    check_budgets(folder)
    for seed in range(CASES):
        check_case(folder / str(seed), seed)


def test_resumes_are_exact_or_refused(tmp_path: Path) -> None:
    for seed in range(CASES):
        (tmp_path / str(seed)).mkdir()
    run_ranks(1, check_all, tmp_path)
