"""Growths that must not happen: an exact one that changes the function, and one of a broken model.

A broken model (weights that are not finite, or too large) is neither saved nor grown: the run
rewinds.
"""

import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megagrow.run
import megagrow.train.growth_event.run_growths
import megagrow.train.loop
from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.schema import RunConfig
from megagrow.growth.map import GrowthMap
from megagrow.train.stage import Stage
from tests.helpers.checkpoint.written import shards
from tests.helpers.jobs import Hook, records, train, write_run
from tests.helpers.run.refusals import assert_refused
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

pytestmark = pytest.mark.dist

BEFORE, AFTER = 4, 3
DEEP = MODEL | {"num_hidden_layers": 4}


def a_new_layer_that_speaks(rank: int, patch: pytest.MonkeyPatch) -> None:
    """A defect in an operator: one of its silent layers is not silent."""
    growth_map = megagrow.train.growth_event.run_growths.growth_map

    def defective(*arguments: object) -> GrowthMap:
        found = growth_map(*arguments)
        speaking = "model.layers.1.self_attn.o_proj.weight"
        copied = found.weights["model.layers.0.self_attn.o_proj.weight"]
        weights = {**found.weights, speaking: copied}
        fills = {name: fill for name, fill in found.fills.items() if name != speaking}
        return replace(found, weights=weights, fills=fills)

    patch.setattr(megagrow.train.growth_event.run_growths, "growth_map", defective)


def growing(tmp_path: Path, **changes: Any) -> RunConfig:
    return make_run(
        tmp_path,
        [
            {"tokens": BEFORE * STEP_TOKENS, "optimizer": {"lr": 3e-2}},
            {
                "model": DEEP,
                "tokens": AFTER * STEP_TOKENS,
                "growth": {"operator": "zero_depth", "tolerance": 1e-7},
            },
        ],
        **changes,
    )


def test_the_run_stops_and_the_checkpoint_is_intact(tmp_path: Path) -> None:
    run = growing(tmp_path)
    path = write_run(tmp_path / "run.yaml", run)
    said = assert_refused(train(path, 2, a_new_layer_that_speaks).finish())
    assert said.startswith(f"the growth at step {BEFORE} by zero_depth should preserve")
    assert "no step was taken" in said
    assert [step for (step,) in records(run, "train", ["step"])] == list(range(1, BEFORE + 1))
    assert read_manifest(run.output_dir / "checkpoints" / f"step-{BEFORE:09d}").run["stage"] == 0
    assert train(path, 2).finish().codes == [0, 0], "without the defect the same command goes on"
    ((before, after),) = records(run, "growth", ["loss_before", "loss_after"])[-1:]
    assert before == after


def spoiled(value: float, *hooks: Hook) -> Hook:
    """In the last step of the first stage, an entry of each of rank 1's weights gets a value."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        train_step, steps = megagrow.train.loop.train_step, []

        def spoiling(stage: Stage, *arguments: Any) -> Any:
            result = train_step(stage, *arguments)
            steps.append(result)
            if rank == 1 and len(steps) == BEFORE:
                for kinds in stage.engine.storage().values():
                    kinds["fp32"][0] = value
            stage.engine.ready(stage.engine.adam_step)  # on all ranks
            return result

        patch.setattr(megagrow.train.loop, "train_step", spoiling)
        for other in hooks:
            other(rank, patch)

    return hook


def unchecked(rank: int, patch: pytest.MonkeyPatch) -> None:
    """States are saved as by earlier versions."""
    patch.setattr(megagrow.run, "unfit_reason", lambda *_: None)


@pytest.mark.parametrize("value", [math.nan, 1e30], ids=["not finite", "too large"])
def test_a_broken_model_is_rewound_instead_of_saved_and_grown(tmp_path: Path, value: float) -> None:
    run = growing(tmp_path, checkpoint={"interval": 2, "keep_last": 1})
    done = train(write_run(tmp_path / "run.yaml", run), 2, spoiled(value)).finish()
    assert done.codes == [0, 0], done.err
    assert records(run, "rewind", ["step", "from_step"]) == [(2, BEFORE)]
    reason = "fp32 of " if value != value else "the loss before the growth is not finite"
    assert f"rewind to step 2 | {reason}" in done.out[0]
    assert [step for (step,) in records(run, "growth", ["step"])] == [BEFORE]
    assert_finite(run, BEFORE, BEFORE + AFTER)


def test_a_broken_checkpoint_before_a_growth_is_no_dead_end(tmp_path: Path) -> None:
    run = growing(tmp_path, checkpoint={"interval": 2, "keep_last": 2})
    path = write_run(tmp_path / "run.yaml", run)
    assert train(path, 2, spoiled(math.nan, unchecked)).finish().codes == [2, 2]
    with pytest.raises(AssertionError):
        assert_finite(run, BEFORE)
    assert train(path, 2).finish().codes == [0, 0]
    assert records(run, "rewind", ["step", "from_step"]) == [(2, BEFORE)]
    assert_finite(run, BEFORE, BEFORE + AFTER)


def stopped(rank: int, patch: pytest.MonkeyPatch) -> None:
    """A signal arrives in the step in which the model breaks."""
    train_step, steps = megagrow.train.loop.train_step, []

    def stopping(*arguments: Any) -> Any:
        steps.append(None)
        if rank == 0 and len(steps) == BEFORE:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*arguments)

    patch.setattr(megagrow.train.loop, "train_step", stopping)


def test_a_broken_model_is_not_saved_when_the_run_is_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"tokens": 3 * BEFORE * STEP_TOKENS}], checkpoint={"interval": 3})
    done = train(write_run(tmp_path / "run.yaml", run), 2, spoiled(math.nan, stopped)).finish()
    assert done.codes == [0, 0], done.err
    assert f"warning: step {BEFORE} | not saved | fp32 of " in done.out[0]
    assert [path.name for path in list_checkpoints(run.output_dir / "checkpoints")] == [
        "step-000000003"
    ]


def test_a_broken_checkpoint_without_an_earlier_one_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"tokens": BEFORE * STEP_TOKENS}])
    path = write_run(tmp_path / "run.yaml", run)
    assert train(path, 2, spoiled(math.nan, unchecked)).finish().codes == [0, 0]
    longer = make_run(tmp_path, [{"tokens": 2 * BEFORE * STEP_TOKENS}])
    done = train(write_run(path, longer), 2).finish()
    assert done.codes == [3, 3], done.err
    assert done.err[0].startswith(f"error: step {BEFORE}: fp32 of ")
    assert "and there is no checkpoint of an earlier step" in done.err[0]


def assert_finite(run: RunConfig, *steps: int) -> None:
    """All tensors of these checkpoints are finite."""
    for step in steps:
        folder = run.output_dir / "checkpoints" / f"step-{step:09d}"
        for tensors in shards(folder).values():
            assert all(tensor.isfinite().all() for tensor in tensors.values()), step
