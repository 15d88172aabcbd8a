"""The rate of new entries over a grown stage, and which growths give them one."""

import math
from typing import Any

import pytest

from megagrow.train.schedule import new_entries_of, new_entries_rate, rate_at
from tests.helpers.train.schedules import BY_SIZE, DEEP, STEP, make_run, stage


def rates(kind: str, steps: int, peak: float = 1.5, warmup: int = 4) -> list[float]:
    """Learning rate of the new entries in every step after a growth at half of the schedule."""
    own = {"peak_factor": peak, "warmup_steps": warmup}
    growth = {"lr_schedule": "continue", "new_entries": own}
    schedule = {"type": kind}
    run = make_run(stage(steps, schedule=schedule), stage(steps, growth, schedule=schedule))
    return [new_entries_rate(run, 1, step * STEP) for step in range(steps + 2)]


def test_it_rises_from_the_rate_at_the_growth_and_falls_with_the_schedule() -> None:
    half = 0.55  # of the linear schedule from 1 to 0.1
    found = rates("linear", 8)
    peak = 1.5 * half
    assert found[:4] == pytest.approx([half * part for part in (1.125, 1.25, 1.375, 1.5)])
    way = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert found[4:9] == pytest.approx([0.1 + part * (peak - 0.1) for part in way])
    assert found[8:] == pytest.approx([0.1, 0.1])


def test_it_may_be_lower_and_does_not_outlast_the_schedule() -> None:
    lower = rates("linear", 8, peak=0.5)
    assert lower[:5] == pytest.approx([0.55 * x for x in (0.875, 0.75, 0.625, 0.5, 0.5)])
    assert rates("linear", 4, warmup=8)[4:] == pytest.approx([0.1, 0.1])
    assert rates("constant", 4, warmup=0)[0] == 1.5


def test_it_starts_from_the_rate_that_follows_the_size() -> None:
    growth = BY_SIZE | {"new_entries": {"peak_factor": 2.0, "warmup_steps": 0}}
    run = make_run(stage(4), stage(4, growth, **DEEP))
    assert new_entries_rate(run, 1, 0) == pytest.approx(2 * rate_at(run, 1, 0))
    assert new_entries_rate(run, 1, 4 * STEP) == pytest.approx(rate_at(run, 1, 4 * STEP))


def test_there_is_one_where_the_run_or_the_operator_says_so() -> None:
    def own(growth: dict[str, Any]) -> tuple[float, int] | None:
        options = make_run(stage(1), stage(1, growth)).stages[1].growth
        found = None if options is None else new_entries_of(options)
        return None if found is None else (found.peak_factor, found.warmup_steps)

    assert own({"operator": "direct_width"}) is None
    assert own({"operator": "sparkling"}) == (1.3, 250)
    assert own({"operator": "sparkling", "new_entries": {"peak_factor": 2.0}}) == (2.0, 250)
    assert own({"operator": "direct_depth", "new_entries": {"warmup_steps": 3}}) == (1.3, 3)
