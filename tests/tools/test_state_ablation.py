"""State ablation: run segments, schedules and locks."""

import subprocess
from pathlib import Path

import pytest

from megagrow.config.stage_length import stage_tokens
from megagrow.errors import InputError
from megagrow.model.layers.flops import paper_flops_per_token
from megagrow.train.reporting.metrics import Counters, MetricsLog
from megagrow.train.schedule import rate_at
from tools.experiments.state_ablation import (
    BASE_STEPS,
    CLOSE_INTERVAL,
    CLOSE_STEPS,
    GROWN_STEPS,
    INTERVAL,
    REFERENCE,
    STEP_TOKENS,
    VARIANTS,
    RunSegment,
    StateAblation,
    Variant,
    is_finished,
    lock,
)

ABLATION = StateAblation(Path("runs"), Path("corpus"), 0.95)


def rates(segment: RunSegment) -> list[float]:
    """Return the learning rates of a segment's last stage, from the start of the stage."""
    run = segment.shortened()
    last = len(run.stages) - 1
    return [rate_at(run, last, step * STEP_TOKENS) for step in range(segment.end)]


def test_validation_intervals_divide_the_stages() -> None:
    assert GROWN_STEPS % 4 == 0
    assert GROWN_STEPS // 4 % CLOSE_INTERVAL == GROWN_STEPS // 2 % INTERVAL == 0
    assert BASE_STEPS % CLOSE_INTERVAL == BASE_STEPS % INTERVAL == GROWN_STEPS % INTERVAL == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_segments_are_parts_of_one_run(variant: Variant) -> None:
    close, full = ABLATION.variant(1, variant)
    assert rates(close) == rates(full)[:CLOSE_STEPS]
    assert (close.step, full.step) == (BASE_STEPS + CLOSE_STEPS, BASE_STEPS + GROWN_STEPS)
    assert full.run.stages[0] == ABLATION.base(1)[0].run.stages[0]
    growth = full.run.stages[1].growth
    assert growth is not None
    assert (growth.optimizer_state, growth.lr_schedule) == tuple(variant)
    assert len(rates(full)) == GROWN_STEPS


def test_schedules_differ_at_the_start_and_agree_at_the_end() -> None:
    before = rates(ABLATION.base(1)[0])
    rewarmed, continued = (
        rates(ABLATION.variant(1, REFERENCE._replace(schedule=schedule))[-1])
        for schedule in ("rewarm", "continue")
    )
    assert rewarmed[0] == pytest.approx(2e-3 / 20)
    assert max(rewarmed) == rewarmed[19] == pytest.approx(2e-3)
    assert 0 < before[-2] - before[-1] < 3e-5
    assert 0 < before[-1] - continued[0] < 3e-5
    assert rewarmed[-1] == pytest.approx(2e-4, rel=0.01)
    assert continued[-1] == pytest.approx(2e-4, rel=0.01)


def test_scratch_has_the_flops_of_base_and_grown_stage() -> None:
    def flops(segment: RunSegment) -> int:
        run = segment.shortened()
        return sum(stage_tokens(s) * paper_flops_per_token(s.model) for s in run.stages)

    (scratch,) = ABLATION.scratch(1)
    step = STEP_TOKENS * paper_flops_per_token(scratch.run.stages[0].model)
    assert abs(flops(scratch) - flops(ABLATION.variant(1, REFERENCE)[-1])) <= step / 2


def write_metrics(directory: Path, steps: int, run_steps: int) -> Path:
    """Write the metrics of a run with `run_steps` planned and `steps` finished steps."""
    with MetricsLog(directory) as log:
        log.write("start", Counters(), name="run", seed=1, parameters=[1], run_steps=run_steps)
        costs = {"flops": 1.0, "flops_true": 1.0, "elapsed_seconds": 1.0}
        done = Counters(step=steps, tokens=steps * STEP_TOKENS, **costs)
        log.write("train", done, stage=0, loss=3.0)
        log.write("end", done)
    return directory


def test_a_run_is_finished_with_its_last_segment(tmp_path: Path) -> None:
    segment = ABLATION.variant(1, REFERENCE)[-1]
    steps, close = BASE_STEPS + GROWN_STEPS, BASE_STEPS + CLOSE_STEPS
    assert is_finished(write_metrics(tmp_path / "full", steps, steps), segment)
    assert not is_finished(write_metrics(tmp_path / "first segment", close, close), segment)
    assert not is_finished(write_metrics(tmp_path / "base", BASE_STEPS, BASE_STEPS), segment)
    assert not is_finished(write_metrics(tmp_path / "stopped", steps - 1, steps), segment)
    assert not is_finished(tmp_path / "missing", segment)


def test_a_running_training_is_locked(tmp_path: Path) -> None:
    """The child process keeps the lock after its parent has exited."""
    with (tmp_path / "log.txt").open("a") as first:
        lock(first, tmp_path)
        child = subprocess.Popen(["sleep", "60"], stdout=first)
    try:
        with (tmp_path / "log.txt").open("a") as second, pytest.raises(InputError, match="another"):
            lock(second, tmp_path)
    finally:
        child.kill()
        child.wait()
    with (tmp_path / "log.txt").open("a") as third:
        lock(third, tmp_path)
