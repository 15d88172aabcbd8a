"""Random runs, stopped anywhere and resumed with a changed configuration, in one process."""

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig
from megagrow.errors import ConfigError
from megagrow.run import train
from megagrow.train.reporting.run_logger import RunLogger
from tests.helpers.jobs import records, write_run
from tests.helpers.runs import MODEL, make_run
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

CASES, LENGTH = 5, 16
FREE = {
    "name": ["another"],
    "checkpoint.interval": [2, 5],
    "checkpoint.keep_last": [1, 4],
    "checkpoint.background": [True, False],
    "validation.interval": [2, 7],
    "logging.interval": [2, 3],
    "guards.hang_timeout": [50, "null"],
}
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


def stopped_at(run: RunConfig, step: int) -> bool:
    """Train until a signal in `step`; return True if the signal stopped the run."""
    record = RunLogger.step

    def recording(self: RunLogger, event: Any) -> None:
        record(self, event)
        if event.state.counters.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "step", recording)
        return train(run) is not None


def last_state(run: RunConfig) -> tuple[int, list[bytes], list[Any]]:
    """Return tokens and shards of the last checkpoint, and the losses of the validations."""
    path = list_checkpoints(run.output_dir / "checkpoints")[-1]
    tokens = read_manifest(path).run["counters"]["tokens"]
    shards = [file.read_bytes() for file in sorted(path.glob("*.safetensors"))]
    return tokens, shards, records(run, "train", ("step", "tokens", "loss", "lr"))[-1:]


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
        assert key in str(error.value), (seed, key)
    assert (parts.output_dir / "config.yaml").read_bytes() == before
    keys = chosen.sample(sorted(FREE), 4)
    free = with_changes(parts, {key: chosen.choice(FREE[key]) for key in keys})
    for end in (".bin", ".idx"):
        shutil.copy(folder / f"train{end}", folder / f"moved{end}")
    train(with_changes(free, {"data.train.0.path": folder / "moved", "logging.interval": 1}))
    found = last_state(parts)
    assert found == expected, (seed, keys)
    assert len(list(parts.output_dir.glob("config-*.yaml"))) == 1
    assert records(parts, "config_change", ["step"]) == []


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


def check_all(folder: Path) -> None:
    dist.destroy_process_group()  # `train` makes its own
    check_batches(folder)
    for seed in range(CASES):
        check_case(folder / str(seed), seed)


def test_resumes_are_exact_or_refused(tmp_path: Path) -> None:
    for seed in range(CASES):
        (tmp_path / str(seed)).mkdir()
    run_ranks(1, check_all, tmp_path)
