"""Gradients that are not finite in some windows of the data, on one rank alone: the run goes back
and comes to the very bits of a run that never read those windows."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megagrow.run
import megagrow.train.step
from megagrow.config.schema import RunConfig
from megagrow.data.batches import Batch, BatchReader
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.train_state import RunState
from tests.helpers.jobs import Hook, records
from tests.helpers.run.grown_runs import (
    BASE_STEPS,
    INTERVAL,
    STEPS,
    WORLD,
    ZERO_3_TP_2,
    finish,
    grown_run,
    last_checkpoint,
    start,
)
from tests.helpers.runs import STEP_TOKENS

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def spoilt(*steps: int) -> Hook:
    """The batches that an undisturbed run reads in these steps give NaN gradients, on rank 1."""
    positions = {(step - 1) * STEP_TOKENS for step in steps}

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        advance, loss_of = megagrow.run.advance, megagrow.train.step._chunk_output
        last = [0]

        def stepping(run: RunConfig, stage: Any, state: RunState, *arguments: Any) -> Any:
            last[0] = state.position
            return advance(run, stage, state, *arguments)

        def spoiling(*arguments: Any) -> Any:
            loss = loss_of(*arguments)
            if rank == 1 and last[0] in positions and loss.requires_grad:
                loss.register_hook(lambda gradient: gradient * math.nan)
            return loss

        patch.setattr(megagrow.run, "advance", stepping)
        patch.setattr(megagrow.train.step, "_chunk_output", spoiling)

    return hook


def without(first: int, last: int) -> Hook:
    """The stream has no batches `first` to `last`, counted from 1."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        read = BatchReader.read

        def reading(self: BatchReader, position: int, indices: Any) -> Batch:
            beyond = position >= (first - 1) * STEP_TOKENS and self is not fixed.get("validation")
            return read(self, position + beyond * (last - first + 1) * STEP_TOKENS, indices)

        opened, fixed = megagrow.run.open_inputs_on_all_ranks, {}

        def opening(run: RunConfig) -> Any:
            inputs = opened(run)
            fixed["validation"] = inputs.stages[0].fixed
            return inputs

        patch.setattr(megagrow.run, "open_inputs_on_all_ranks", opening)
        patch.setattr(BatchReader, "read", reading)

    return hook


def both(one: Hook, other: Hook) -> Hook:
    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        one(rank, patch)
        other(rank, patch)

    return hook


def evaluated(run: RunConfig, *steps: int) -> Hook:
    """There are results of `megagrow eval` for these steps when the run goes back."""
    folder = run.output_dir / "evaluations"

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        target = megagrow.run.rewind_target

        def going_back(*arguments: Any) -> Any:
            if rank == 0:
                folder.mkdir()
                for step in steps:
                    (folder / f"step-{step:09d}.json").touch()
            return target(*arguments)

        patch.setattr(megagrow.run, "rewind_target", going_back)

    return hook


def held(place: Any, name: str, reached: Path, when: Callable[..., bool]) -> Hook:
    """Stops both ranks for ever in place of a call."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        call = getattr(place, name)

        def holding(*args: Any, **options: Any) -> Any:
            if when(*args):
                (reached / str(rank)).touch()
                time.sleep(3600)
            return call(*args, **options)

        patch.setattr(place, name, holding)

    return hook


def trained(run: RunConfig) -> list[tuple[Any, ...]]:
    return records(run, "train", ("step", "tokens", "flops", "stage", "loss", "lr", "grad_norm"))


def assert_as_if_never_read(folder: Path, run: RunConfig, first: int, last: int) -> None:
    """The run is one whose stream lacks the batches `first` to `last`."""
    folder.mkdir()
    parallel = run.stages[0].parallel.model_dump()
    spared = grown_run(folder, parallel, run.stages[0].batch.micro_batch_size)
    finish(start(spared, without(first, last)))
    assert trained(run) == trained(spared)
    found, right = last_checkpoint(run), last_checkpoint(spared)
    assert len(right[0]) == WORLD
    assert found[0] == right[0]
    assert found[1]["run"]["skipped_tokens"] == (last - first + 1) * STEP_TOKENS
    positions = [position for (position,) in records(run, "train", ["position"])]
    skipped = range((first - 1) * STEP_TOKENS, last * STEP_TOKENS, STEP_TOKENS)
    whole = range(0, STEPS * STEP_TOKENS + len(skipped) * STEP_TOKENS, STEP_TOKENS)
    assert positions == [position for position in whole if position not in skipped]


@pytest.mark.parametrize(
    ("bad", "back_to", "stage", "parallel"),
    [
        ((2, 3, 4), 0, 0, {"zero_stage": 2}),
        ((8, 9, 10), 6, 0, ZERO_3_TP_2),
        ((14, 15, 16), BASE_STEPS, 0, {"zero_stage": 1}),
        ((20, 21, 22), 18, 1, {"zero_stage": 2}),
    ],
    ids=["no checkpoint yet", "plain", "over a growth", "after a growth"],
)
def test_goes_back_and_passes_over_the_window(
    tmp_path: Path, bad: tuple[int, ...], back_to: int, stage: int, parallel: dict[str, Any]
) -> None:
    run = grown_run(tmp_path, parallel, 2)
    done = finish(start(run, both(spoilt(*bad), evaluated(run, back_to, back_to + 1))))
    kept = [path.name for path in (run.output_dir / "evaluations").iterdir()]
    assert kept == [f"step-{back_to:09d}.json"]
    failed = (
        f"step {bad[-1]} | rewind to step {back_to} | 3 consecutive steps with a non-finite loss "
        "or gradient"
    )
    assert f"step {bad[0]} | skipped | loss or gradient not finite" in done.out[0]
    assert failed in done.out[0]
    window = back_to * STEP_TOKENS, bad[-1] * STEP_TOKENS
    told = ("step", "stage", "from_step", "skipped_from", "skipped_to", "rewinds", "skipped_steps")
    assert records(run, "rewind", told) == [(back_to, stage, bad[-1], *window, 1, 0)]
    assert_as_if_never_read(tmp_path / "spared", run, back_to + 1, bad[-1])


def test_few_in_a_row_are_skipped_and_that_is_all(tmp_path: Path) -> None:
    run = grown_run(tmp_path)
    finish(start(run, spoilt(5, 6, 9)))
    skipped = records(run, "train", ("step", "skipped", "skipped_steps", "grad_norm"))
    assert [step for step, is_skipped, *_ in skipped if is_skipped] == [5, 6, 9]
    assert skipped[9] == (10, False, 3, skipped[9][-1])
    assert all((norm is None) == is_skipped for _, is_skipped, _, norm in skipped)
    assert records(run, "rewind", ["step"]) == []
    saved = [step for (step,) in records(run, "checkpoint", ["step"])]
    assert 6 not in saved and 9 not in saved, "in the middle of trouble"
    assert last_checkpoint(run)[1]["adam_step"] == STEPS - 3


def test_from_a_checkpoint_that_it_cannot_leave_it_goes_to_the_one_before(tmp_path: Path) -> None:
    run = grown_run(tmp_path)
    finish(start(run, spoilt(*range(7, 13))))
    assert records(run, "rewind", ("step", "from_step", "rewinds")) == [(3, 9, 2)]
    assert_as_if_never_read(tmp_path / "spared", run, 4, 12)


def test_killed_around_a_rewind(tmp_path: Path) -> None:
    run = grown_run(tmp_path)
    places: list[tuple[Any, str, Callable[..., bool]]] = [
        (RunLogger, "step", lambda _, event: event.state.guard.skipped == 2),
        (megagrow.run, "rewind_target", lambda *_: True),
        (megagrow.run, "begin", lambda _, found, *__: found is not None and reached.name == "2"),
        (RunLogger, "step", lambda _, event: event.state.counters.rewinds == 1),
        (RunLogger, "checkpoint", lambda _, state, *__: state.counters.rewinds == 1),
    ]
    for number, place in enumerate(places):
        reached = tmp_path / str(number)
        reached.mkdir()
        job = start(run, both(spoilt(8, 9, 10), held(*place[:2], reached, place[2])))
        job.wait_for(lambda reached=reached: len(list(reached.iterdir())) == WORLD)
        job.kill()
    finish(start(run, spoilt(8, 9, 10)))
    begun = [step for (step,) in records(run, "start", ["step"])]
    assert begun[0] == 0 and set(begun[1:]) == {6, 6 + INTERVAL}, begun
    assert records(run, "rewind", ("step", "from_step", "rewinds")) == [(6, 10, 1)]
    assert_as_if_never_read(tmp_path / "spared", run, 7, 10)


def test_when_no_rewind_is_left_the_run_ends(tmp_path: Path) -> None:
    run = grown_run(tmp_path)
    done = start(run, spoilt(*range(5, 100))).finish()
    assert done.codes == [3] * WORLD
    assert done.err[0] == (
        "error: step 6: 3 consecutive steps with a non-finite loss or gradient, after 3 rewinds of "
        "guards.max_rewinds = 3; inspect the data from position 832 of the stream, and the "
        "learning rate\n"
    )
    assert done.err[1:] == [""] * (WORLD - 1)
