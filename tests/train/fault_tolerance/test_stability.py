"""The guards' decisions, step by step."""

import math
import statistics

import pytest

from megagrow.config.sections import GuardsConfig, LossSpikeConfig, SkipStepConfig
from megagrow.train.train_state import Guard, RunState
from tests.helpers.train.records import measure

SPIKE = GuardsConfig(loss_spike=LossSpikeConfig(window=4, zscore=3, patience=2))
CALM = (2.0, 2.1, 2.0, 2.1)


def after(guards: GuardsConfig, *losses: float, start: Guard | None = None) -> Guard:
    guard = start or Guard()
    for loss in losses:
        guard = guard.after_step(guards, loss, skipped=math.isnan(loss))
    return guard


def test_a_good_step_ends_a_row_of_skipped_ones() -> None:
    assert after(GuardsConfig(), math.nan, math.nan).skipped == 2
    assert after(GuardsConfig(), math.nan, math.nan, 1.0) == Guard()


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_in_a_row_are_enough(limit: int) -> None:
    guards = GuardsConfig(max_skipped_steps=limit)
    rows = [after(guards, *[math.nan] * count) for count in range(limit + 1)]
    assert [guard.reason_to_rewind(guards) is not None for guard in rows] == [False] * limit + [
        True
    ]
    assert [guard.troubled for guard in rows] == [False] + [True] * limit


def test_without_the_option_no_loss_is_a_spike() -> None:
    guard = after(GuardsConfig(), *CALM, 1e9, 1e9, 1e9)
    assert guard == Guard()


def test_a_spike_is_what_lies_far_above_the_last_losses_for_long_enough() -> None:
    once = after(SPIKE, *CALM, 9.0)
    assert (once.high, once.losses, once.reason_to_rewind(SPIKE)) == (1, CALM, None)
    assert after(SPIKE, 2.0, start=once) == Guard(losses=(*CALM[1:], 2.0))
    twice = after(SPIKE, 9.0, start=once)
    assert twice.reason_to_rewind(SPIKE) == "2 consecutive steps with a loss spike"
    assert twice.losses == CALM, "what is high is no measure"


def test_until_the_window_is_full_nothing_is_a_spike() -> None:
    assert after(SPIKE, 2.0, 2.0, 2.0, 9.0).high == 0
    assert after(SPIKE, *CALM).after_growth().losses == ()


def test_a_low_loss_is_no_spike() -> None:
    assert after(SPIKE, *CALM, 0.1, 0.1).high == 0


def test_rewinds_to_the_same_place_or_before_it_are_counted() -> None:
    first = after(SPIKE, *CALM, 9.0, 9.0).after_rewind(Guard(losses=CALM), 30)
    assert first == Guard(losses=CALM, rewinds=1, rewound_to=30)
    assert first.after_rewind(Guard(), 30).rewinds == 2
    assert first.after_rewind(Guard(), 10).rewinds == 2
    assert first.after_rewind(Guard(), 40).rewinds == 1, "the run has come further"


SKIP = GuardsConfig(skip_step=SkipStepConfig(window=8, sigma_factor=2), loss_spike=SPIKE.loss_spike)


def test_limits_are_those_of_the_last_steps_of_the_window() -> None:
    guard, losses, norms = Guard(), [2.0, 2.5, 2.1, 2.3], [1.0, 1.5, 1.2, 0.9]
    for loss, norm in zip(losses, norms, strict=True):
        assert guard.limits(SKIP) is None, "half of the window is not filled"
        guard = guard.after_step(SKIP, loss, skipped=False, norm=norm)
    limits = guard.limits(SKIP)
    assert limits.loss == statistics.fmean(losses) + 2 * statistics.stdev(losses)
    assert limits.norm == statistics.fmean(norms) + 2 * statistics.stdev(norms)
    assert guard.limits(GuardsConfig()) is None
    for number in range(20):
        guard = guard.after_step(SKIP, 1.0 + number, skipped=False, norm=1.0)
    assert guard.recent_losses == tuple(map(float, range(13, 21)))
    assert guard.recent_norms == (1.0,) * 8
    assert guard.after_step(SKIP, math.nan, True, math.nan).limits(SKIP) == guard.limits(SKIP)
    assert guard.after_growth().limits(SKIP) is None
    assert Guard().after_rewind(guard, 3).limits(SKIP) == guard.limits(SKIP)


def test_a_skipped_outlier_is_no_failure_but_can_be_a_spike() -> None:
    """`loss_spike` sees the losses of skipped steps, so that a lasting spike ends in a rewind."""
    guard = Guard(skipped=1)
    for loss in (*CALM, 9.0):
        guard = guard.after_step(SKIP, loss, skipped=False, norm=1.0)
    assert (guard.skipped, guard.high) == (0, 1)
    state = RunState().guarded(SKIP, measure(0, skipped=True, grad_norm=math.inf))
    assert state.guard.skipped == 1
    assert RunState().guarded(SKIP, measure(0, skipped=True)).guard.skipped == 0
