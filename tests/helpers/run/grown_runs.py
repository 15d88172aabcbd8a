"""Grown runs on two ranks, to be interrupted and resumed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagrow.config.schema import RunConfig
from megagrow.train.loop import StepDone
from megagrow.train.reporting.run_logger import RunLogger
from tests.helpers.jobs import Finished, Hook, Job, records, train, write_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

WORLD = 2
BASE_STEPS, STEPS = 12, 26
INTERVAL = 3
ZERO_2 = {"zero_stage": 2}
ZERO_3_TP_2 = {"zero_stage": 3, "tensor_model_parallel_size": 2}
CONTEXT = {"zero_stage": 1, "context_parallel_size": 2}
PIPELINE = {"zero_stage": 1, "pipeline_model_parallel_size": 2}
DEEP = MODEL | {"num_hidden_layers": 4}


def grown_run(
    folder: Path,
    parallel: dict[str, Any] = ZERO_2,
    micro_batch_size: int = 1,
    model: dict[str, Any] = DEEP,
    growth: dict[str, Any] | None = None,
    grown_parallel: dict[str, Any] | None = None,
) -> RunConfig:
    batch = {"global_batch_size": 4, "micro_batch_size": micro_batch_size}
    return make_run(
        folder,
        [
            {"tokens": BASE_STEPS * STEP_TOKENS, "parallel": parallel, "batch": batch},
            {
                "model": model,
                "tokens": (STEPS - BASE_STEPS) * STEP_TOKENS,
                "parallel": grown_parallel or parallel,
                "batch": batch,
                "growth": growth or {"operator": "direct_depth"},
            },
        ],
        checkpoint={"interval": INTERVAL},
        validation={"interval": 5, "tokens": 256},
    )


def start(run: RunConfig, hook: Hook | None = None) -> Job:
    return train(write_run(run.output_dir.with_suffix(".yaml"), run), WORLD, hook)


def finish(job: Job) -> Finished:
    done = job.finish()
    assert (done.codes, done.err) == ([0] * WORLD, [""] * WORLD)
    return done


def last_checkpoint(run: RunConfig) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the last checkpoint's shards, and its manifest without times and checksum."""
    folder = run.output_dir / "checkpoints" / f"step-{STEPS:09d}"
    shards = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("elapsed_seconds", "lost_seconds"):
        del manifest["run"]["counters"][name]
    del manifest["environment"], manifest["checksum"]
    return shards, manifest


def always(*_: Any) -> bool:
    return True


def held_at(place: Any, name: str, reached: Path, when: Callable[..., bool] = always) -> Hook:
    """Stops a rank for ever where it calls place.name, at the first call for which `when` holds.

    Rank 0 stops instead of the call, the others after it: work is left half done.
    """

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        call = getattr(place, name)

        def held(*args: Any, **options: Any) -> Any:
            stop = when(*args)
            result = None if stop and rank == 0 else call(*args, **options)
            if stop:
                (reached / str(rank)).touch()
                time.sleep(3600)
            return result

        patch.setattr(place, name, held)

    return hook


def holds(folder: Path, files: int) -> bool:
    return len(list(folder.iterdir())) == files


def around_step(step: int, reached: Path) -> Hook:
    """Says when a step is done, and holds the run two steps later if it is not killed by then."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        record = RunLogger.step

        def step_done(self: RunLogger, event: StepDone) -> None:
            record(self, event)
            done = event.state.counters.step
            if done >= step and rank == 0:
                reached.touch()
            if done >= step + 2:
                time.sleep(3600)

        patch.setattr(RunLogger, "step", step_done)

    return hook


def history(run: RunConfig) -> dict[str, list[tuple[Any, ...]]]:
    """All that was recorded and does not depend on the clock."""
    counters = ("step", "tokens", "flops", "flops_true", "stage")
    return {
        "train": records(run, "train", (*counters, "loss", "lr", "grad_norm")),
        "validation": records(run, "validation", (*counters, "loss")),
        "growth": records(run, "growth", (*counters, "loss_before", "loss_after", "layers")),
    }


def assert_same(run: RunConfig, expected: RunConfig) -> None:
    assert history(run) == history(expected)
    found, right = last_checkpoint(run), last_checkpoint(expected)
    assert len(right[0]) == WORLD
    assert found == right


def assert_close(run: RunConfig, expected: RunConfig) -> None:
    for found, right in zip(history(run)["train"], history(expected)["train"], strict=True):
        *counters, loss, lr, norm = found
        assert (*counters, lr) == (*right[:-3], right[-2])
        assert (loss, norm) == pytest.approx((right[-3], right[-1]), rel=1e-5)
