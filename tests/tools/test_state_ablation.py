import subprocess
from pathlib import Path

import pytest

from megagrow.config.flops import paper_flops_per_token
from megagrow.config.stage_length import stage_tokens
from megagrow.errors import InputError
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
    Ablation,
    Leg,
    Variant,
    claim,
    is_finished,
)

HERE = Ablation(Path("runs"), Path("corpus"), 0.95)


def rates(leg: Leg) -> list[float]:
    """The learning rates of the steps of a leg's last stage, from the stage's start."""
    run = leg.shortened()
    last = len(run.stages) - 1
    return [rate_at(run, last, step * STEP_TOKENS) for step in range(leg.end)]


def test_measurements_fall_on_the_marks() -> None:
    assert GROWN_STEPS % 4 == 0
    assert GROWN_STEPS // 4 % CLOSE_INTERVAL == GROWN_STEPS // 2 % INTERVAL == 0
    assert BASE_STEPS % CLOSE_INTERVAL == BASE_STEPS % INTERVAL == GROWN_STEPS % INTERVAL == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_legs_are_parts_of_one_run(variant: Variant) -> None:
    close, whole = HERE.variant(1, variant)
    assert rates(close) == rates(whole)[:CLOSE_STEPS]
    assert (close.step, whole.step) == (BASE_STEPS + CLOSE_STEPS, BASE_STEPS + GROWN_STEPS)
    assert whole.run.stages[0] == HERE.base(1)[0].run.stages[0]
    growth = whole.run.stages[1].growth
    assert growth is not None
    assert (growth.optimizer_state, growth.lr_schedule) == tuple(variant)
    assert len(rates(whole)) == GROWN_STEPS


def test_schedules_begin_apart_and_end_together() -> None:
    before = rates(HERE.base(1)[0])
    rewarmed, continued = (
        rates(HERE.variant(1, REFERENCE._replace(schedule=schedule))[-1])
        for schedule in ("rewarm", "continue")
    )
    assert rewarmed[0] == pytest.approx(2e-3 / 20)
    assert max(rewarmed) == rewarmed[19] == pytest.approx(2e-3)
    assert 0 < before[-2] - before[-1] < 3e-5
    assert 0 < before[-1] - continued[0] < 3e-5
    assert rewarmed[-1] == pytest.approx(2e-4, rel=0.01)
    assert continued[-1] == pytest.approx(2e-4, rel=0.01)


def test_scratch_has_the_flops_of_base_and_grown_stage() -> None:
    def flops(leg: Leg) -> int:
        run = leg.shortened()
        return sum(stage_tokens(s, 256) * paper_flops_per_token(s.model) for s in run.stages)

    (scratch,) = HERE.scratch(1)
    step = STEP_TOKENS * paper_flops_per_token(scratch.run.stages[0].model)
    assert abs(flops(scratch) - flops(HERE.variant(1, REFERENCE)[-1])) <= step / 2


def write_metrics(directory: Path, steps: int, run_steps: int) -> Path:
    """A run that was planned for `run_steps` steps and ended, or was stopped, after `steps`."""
    with MetricsLog(directory, False, None, "run") as log:
        log.write("start", Counters(), name="run", seed=1, parameters=[1], run_steps=run_steps)
        done = Counters(step=steps, tokens=steps * STEP_TOKENS)
        log.write("train", done, stage=0, loss=3.0)
        log.write("end", done)
    return directory


def test_run_is_finished_when_its_last_leg_is(tmp_path: Path) -> None:
    leg = HERE.variant(1, REFERENCE)[-1]
    steps, close = BASE_STEPS + GROWN_STEPS, BASE_STEPS + CLOSE_STEPS
    assert is_finished(write_metrics(tmp_path / "whole", steps, steps), leg)
    assert not is_finished(write_metrics(tmp_path / "first leg", close, close), leg)
    assert not is_finished(write_metrics(tmp_path / "base", BASE_STEPS, BASE_STEPS), leg)
    assert not is_finished(write_metrics(tmp_path / "stopped", steps - 1, steps), leg)
    assert not is_finished(tmp_path / "nowhere", leg)


def test_run_that_is_still_trained_is_left_alone(tmp_path: Path) -> None:
    """The lock is that of the child, which outlives who started it."""
    with (tmp_path / "log.txt").open("a") as first:
        claim(first, tmp_path)
        child = subprocess.Popen(["sleep", "60"], stdout=first)
    try:
        with (tmp_path / "log.txt").open("a") as second, pytest.raises(InputError, match="another"):
            claim(second, tmp_path)
    finally:
        child.kill()
        child.wait()
    with (tmp_path / "log.txt").open("a") as third:
        claim(third, tmp_path)
