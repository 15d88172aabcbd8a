import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config.growth_guidelines import rate_for_size
from megagrow.config.schema import OptimizerConfig, RunConfig, ScheduleConfig
from megagrow.config.stage_length import (
    run_tokens,
    settled,
    stage_steps,
    stage_tokens,
    step_tokens,
    steps_left,
)
from megagrow.config.validation import problems
from megagrow.model.layers.flops import parameters
from megagrow.train.growth_event.new_entries import UpdateFactors, update_factors
from megagrow.train.schedule import (
    learning_rate,
    new_entries_rate,
    origin_stage,
    rate_at,
    stage_optimizer,
)
from tests.helpers.train.schedules import (
    BATCH,
    BY_SIZE,
    DEEP,
    MODEL,
    STEP,
    Position,
    locate,
    make_run,
    stage,
    tokens_at,
)

PEAK = OptimizerConfig(lr=1.0, min_lr=0.1)
types = st.sampled_from(("cosine", "linear", "wsd", "constant"))


def rates(run: RunConfig) -> list[float]:
    """The rate of every step of the run."""
    points = [locate(run, step) for step in range(steps_left(run))]
    sizes = [step_tokens(one) for one in run.stages]
    return [rate_at(run, at.stage, at.step * sizes[at.stage]) for at in points]


def batch_of(times: int) -> dict[str, Any]:
    """A change of a stage: its batch is so many times the usual one."""
    return {"batch": {"global_batch_size": times * BATCH, "micro_batch_size": 1}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        ({"type": "linear"}, {0: 1.0, 5: 0.55, 9: 0.19, 10: 0.1, 20: 0.1}),
        ({"type": "linear", "warmup_steps": 2}, {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.55, 10: 0.1}),
        ({"type": "linear", "horizon_tokens": 20 * STEP}, {0: 1.0, 10: 0.55, 20: 0.1}),
        ({"type": "cosine"}, {0: 1.0, 5: 0.55, 10: 0.1, 11: 0.1}),
        ({"type": "cosine", "warmup_steps": 2}, {4: 0.55 + 0.45 * math.cos(math.pi / 4)}),
        ({"type": "wsd", "decay_tokens": 4 * STEP}, {0: 1.0, 6: 1.0, 8: 0.55, 9: 0.325, 10: 0.1}),
        ({"type": "wsd"}, {8: 1.0, 9: 1.0, 10: 0.1}),
        ({"type": "wsd", "warmup_steps": 8, "decay_tokens": 4 * STEP}, {7: 1.0, 9: 0.55}),
        ({"type": "linear", "warmup_tokens": 3 * STEP // 2}, {0: 2 / 3, 1: 1.0}),
    ],
)
def test_known_values(settings: dict[str, Any], expected: dict[int, float]) -> None:
    schedule = ScheduleConfig(**settings)
    found = {at: learning_rate(schedule, PEAK, at * STEP, STEP, 10 * STEP) for at in expected}
    assert found == pytest.approx(expected)


@given(kind=types, warmup=st.integers(0, 30), horizon=st.integers(1, 60), decay=st.integers(1, 60))
def test_rate_is_positive_rises_once_falls_once_and_ends_at_the_minimum(
    kind: str, warmup: int, horizon: int, decay: int
) -> None:
    schedule = ScheduleConfig(type=kind, warmup_steps=warmup, decay_tokens=decay * STEP)
    values = [learning_rate(schedule, PEAK, at * STEP, STEP, horizon * STEP) for at in range(80)]
    top = values.index(max(values))
    assert 0 < min(values) <= max(values) <= 1.0
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    if warmup <= horizon:
        assert max(values) == 1.0
    assert values[max(warmup, horizon) :] == pytest.approx(
        [1.0 if kind == "constant" else 0.1] * (80 - max(warmup, horizon))
    )


@given(kind=types, warmup=st.integers(1, 20), at=st.integers(0, 999))
def test_rate_is_continuous_in_tokens(kind: str, warmup: int, at: int) -> None:
    """One token more changes it by no more than the steepest slope of any part."""
    schedule = ScheduleConfig(type=kind, warmup_tokens=warmup * 10, decay_tokens=200)
    here, there = (learning_rate(schedule, PEAK, one, 1, 1000) for one in (at, at + 1))
    steepest = max(1 / (warmup * 10), 0.9 * math.pi / 2 / 200)
    assert abs(here - there) <= steepest * (1 + 1e-9)


@given(
    kind=types,
    parts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    warmup=st.integers(0, 8),
)
def test_continuing_is_as_if_there_were_one_stage(kind: str, parts: list[int], warmup: int) -> None:
    schedule = {"type": kind, "warmup_steps": warmup, "decay_tokens": 5 * STEP}
    on = {"lr_schedule": "continue"}
    split = [stage(one, on if at else None, schedule=schedule) for at, one in enumerate(parts)]
    assert rates(make_run(*split)) == rates(make_run(stage(sum(parts), schedule=schedule)))


def test_a_warm_up_in_steps_ends_with_its_last_step_in_a_batch_ramp() -> None:
    ramp = {"rampup_batch_size": [2, 2, 8], "global_batch_size": 6, "micro_batch_size": 1}
    schedule = {"type": "constant", "warmup_steps": 4}
    run = make_run(stage(10, schedule=schedule, batch=ramp))
    starts, sizes = [0, 16, 32, 64, 112], [16, 16, 32, 48, 48]
    assert [step_tokens(run.stages[0], at) for at in starts] == sizes
    found = [rate_at(run, 0, at) for at in starts]
    assert found == pytest.approx([16 / 112, 32 / 112, 64 / 112, 1.0, 1.0])


def test_rewarming_starts_again_and_ends_with_the_run() -> None:
    schedule = {"type": "linear", "warmup_steps": 2}
    run = make_run(stage(10, schedule=schedule), stage(10, {}, schedule=schedule))
    alone = make_run(stage(10, schedule=schedule))
    undivided = make_run(stage(20, schedule=schedule))
    assert rates(run)[:10] == rates(undivided)[:10]
    assert rates(run)[10:] == rates(alone)


def test_origin_goes_back_to_the_last_rewarming() -> None:
    on, again = {"lr_schedule": "continue"}, {"lr_schedule": "rewarm"}
    growths = (None, on, again, on, on)
    run = make_run(*(stage(1, growth) for growth in growths))
    assert [origin_stage(run, index) for index in range(5)] == [0, 0, 2, 2, 2]


def test_continuing_takes_the_new_stages_peak() -> None:
    constant, on = {"type": "constant"}, {"lr_schedule": "continue"}
    lower = stage(2, on, schedule=constant, optimizer={"lr": 0.5})
    assert rates(make_run(stage(2, schedule=constant), lower)) == [1.0, 1.0, 0.5, 0.5]


@given(tokens=st.lists(st.integers(1, 5 * STEP), min_size=1, max_size=4))
def test_every_step_has_one_place(tokens: list[int]) -> None:
    run = make_run(*(stage(1, {} if at else None, tokens=n) for at, n in enumerate(tokens)))
    steps = [stage_steps(one) for one in run.stages]
    expected = [Position(at, step) for at, count in enumerate(steps) for step in range(count)]
    assert [locate(run, step) for step in range(steps_left(run))] == expected
    assert locate(run, steps_left(run)) == (len(tokens) - 1, steps[-1])
    assert [tokens_at(run, at) for at in range(sum(steps) + 1)] == [
        at * STEP for at in range(sum(steps) + 1)
    ]
    assert all(0 <= n * STEP - asked < STEP for n, asked in zip(steps, tokens, strict=True))
    assert run_tokens(run) == sum(steps) * STEP


@given(
    policy=st.sampled_from(("rewarm", "continue")),
    parts=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=2, max_size=4),
    warmup=st.integers(0, 8),
)
def test_wsd_decays_once_at_the_end_of_the_run(
    policy: str, parts: list[tuple[int, int]], warmup: int
) -> None:
    """Whatever the batches are: each growth finds the rate high, only the run's end brings it down,
    to where the next step would have min_lr; warm-up comes once, or once a stage."""
    decay = 3 * STEP
    schedule = {"type": "wsd", "warmup_steps": warmup, "decay_tokens": decay}
    on = {"lr_schedule": policy}
    run = make_run(
        *(
            stage(1, on if at else None, schedule=schedule, tokens=steps * size * STEP)
            | batch_of(size)
            for at, (steps, size) in enumerate(parts)
        )
    )
    values = rates(run)
    ends = run_tokens(run)
    origin = 0
    for step, value in enumerate(values):
        at = locate(run, step)
        start = tokens_at(run, step)
        size = parts[at.stage][1] * STEP
        if policy == "rewarm" and at.step == 0:
            origin = start
        first_batch = parts[at.stage if policy == "rewarm" else 0][1] * STEP
        rising = min(1.0, (start + size - origin) / (warmup * first_batch)) if warmup else 1.0
        begins = max(ends - decay, origin + warmup * first_batch)
        left = min(1.0, (ends - start) / (ends - begins)) if begins < ends else 1.0
        assert value == pytest.approx(min(rising, 0.1 + 0.9 * left))


def test_a_larger_batch_does_not_warm_up_again() -> None:
    schedule, on = {"type": "constant", "warmup_steps": 4}, {"lr_schedule": "continue"}
    run = make_run(stage(5, schedule=schedule), stage(12, on, schedule=schedule) | batch_of(3))
    assert rates(run) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@given(
    parts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=4),
)
def test_tokens_are_counted_right_where_the_batch_changes(parts: list[tuple[int, int]]) -> None:
    changes = [{"tokens": tokens * STEP, **batch_of(size)} for tokens, size in parts]
    run = make_run(*(stage(1, {} if at else None) | one for at, one in enumerate(changes)))
    expected, end = [0], 0
    for tokens, size in parts:
        steps = -(-tokens // size)
        expected += [end + step * size * STEP for step in range(1, steps + 1)]
        end = expected[-1]
    assert [tokens_at(run, step) for step in range(steps_left(run) + 1)] == expected
    assert run_tokens(run) == end
    assert [stage_tokens(one) for one in run.stages] == [
        -(-tokens // size) * size * STEP for tokens, size in parts
    ]


@pytest.mark.parametrize("new_entries", [False, True])
def test_a_rate_depends_on_the_tokens_trained_before_a_growth(new_entries: bool) -> None:
    """A batch of 9 after the first of 10 steps ends stage 0 at the same tokens: rates are equal."""
    growth: dict[str, Any] = {"lr_schedule": "continue"}
    if new_entries:
        growth["new_entries"] = {"warmup_steps": 2}
    begin = {"schedule": {"type": "cosine", "warmup_tokens": STEP}}
    run, other = (
        make_run(stage(10, **begin, **batch), stage(10, growth, **begin))
        for batch in (batch_of(1), batch_of(9))
    )
    rate = new_entries_rate if new_entries else rate_at
    expected = [rate(run, 1, step * STEP) for step in range(11)]
    assert [rate(other, 1, step * STEP) for step in range(11)] != expected, "18 planned steps"
    known = settled(other, 1, 3 * STEP, (10 * STEP,))
    assert [rate(known, 1, step * STEP) for step in range(11)] == expected
    begun = settled(other, 0, STEP)
    assert rate_at(begun, 0, STEP) == rate_at(run, 0, STEP), "the horizons are equal"
    assert rate(begun, 1, 0) == expected[0]


@pytest.mark.parametrize("restart", [False, True])
def test_new_entries_keep_their_rate_in_a_stage_without_growth(restart: bool) -> None:
    growth = {"lr_schedule": "continue", "new_entries": {"warmup_steps": 6}}
    growth |= {"freeze_tokens": 4 * STEP}
    schedule = {"type": "cosine", "restart": restart}
    whole = make_run(stage(5), stage(8, growth))
    split = make_run(stage(5), stage(3, growth), stage(5, schedule=schedule))
    expected = [update_factors(whole, 1, step * STEP) for step in range(8)]
    found = [update_factors(split, 1, step * STEP) for step in range(3)]
    found += [update_factors(split, 2, step * STEP) for step in range(5)]
    assert len({factors.new for factors in expected}) == 8
    assert [factors.old for factors in expected] == [0.0] * 4 + [1.0] * 4
    assert found == expected[:3] + ([UpdateFactors()] * 5 if restart else expected[3:])


SIZES = (2 * 128 + 8 + 464, 2 * 128 + 8 + 4 * 464)
"""Parameters of MODEL and DEEP: two tables, the last norm, and 256 + 192 + 16 a layer."""


def test_by_size_goes_on_at_the_papers_ratio_of_rates() -> None:
    schedule = {"type": "cosine", "warmup_steps": 2}
    run = make_run(stage(6, schedule=schedule), stage(6, BY_SIZE, schedule=schedule, **DEEP))
    undivided = rates(make_run(stage(12, schedule=schedule)))
    assert tuple(parameters(one.model) for one in run.stages) == SIZES
    ratio = rate_for_size(SIZES[1]) / rate_for_size(SIZES[0])
    # At this size the paper's first segment goes on: rates fall as size to the power -0.5354.
    assert ratio == pytest.approx((SIZES[1] / SIZES[0]) ** -0.5354, rel=1e-4)
    assert rates(run) == pytest.approx(undivided[:6] + [ratio * one for one in undivided[6:]])


def test_by_size_follows_size_from_stage_to_stage() -> None:
    deeper = {"model": MODEL | {"num_hidden_layers": 16}}
    run = make_run(stage(2), stage(2, BY_SIZE, **DEEP), stage(2, BY_SIZE, **deeper))
    sizes = [parameters(one.model) for one in run.stages]
    found = [stage_optimizer(run, index) for index in range(3)]
    wanted = [rate_for_size(size) / rate_for_size(sizes[0]) for size in sizes]
    assert [one.lr for one in found] == pytest.approx(wanted)
    assert [one.min_lr for one in found] == pytest.approx([0.1 * one for one in wanted])
    assert all(one.betas == (0.9, 0.95) for one in found)
    assert origin_stage(run, 2) == 0


def test_a_rate_that_by_size_would_pass_over_is_refused() -> None:
    right = make_run(stage(2), stage(2, BY_SIZE))
    wrong = make_run(stage(2), stage(2, BY_SIZE, optimizer={"lr": 0.5, "min_lr": 0.1}))
    assert problems(right) == []
    assert problems(wrong) == [
        "stages.1.optimizer.lr = 0.5 differs from stages.0.optimizer.lr = 1.0, which lr_schedule "
        "by_size scales; use 1.0, or set stages.1.growth.lr_schedule to rewarm or continue"
    ]
