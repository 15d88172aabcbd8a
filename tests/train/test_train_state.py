"""State of a run whose growths use tokens and FLOPs."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import run_tokens, steps_left
from megagrow.errors import CheckpointError
from megagrow.train.reporting.metrics import Counters, StepMetrics
from megagrow.train.train_state import RunState
from tests.helpers.train.schedules import LENGTH, MODEL, locate, tokens_at


def run_of(parts: list[tuple[int, int]]) -> RunConfig:
    """A run whose stages have so many steps, each of so many sequences."""
    stages = [
        {
            "model": MODEL,
            "tokens": steps * batch * LENGTH,
            "batch": {"global_batch_size": batch, "micro_batch_size": 1},
            "optimizer": {"lr": 1.0},
            "growth": {} if at else None,
        }
        for at, (steps, batch) in enumerate(parts)
    ]
    data = {"train": [{"path": "corpus"}], "sequence_length": LENGTH}
    whole = {"name": "run", "output_dir": "out", "data": data, "stages": stages}
    return RunConfig.model_validate(whole)


def a_step(state: RunState, batch: int) -> RunState:
    measure = StepMetrics(
        stage=state.stage,
        loss=1.0,
        lr=1.0,
        grad_norm=None,
        tokens=batch * LENGTH,
        flops=2.0,
        flops_true=3.0,
        seconds=0.5,
        memory_bytes=0,
        position=state.position,
    )
    return state.after_step(measure)


def test_a_growth_that_uses_nothing_changes_place_alone() -> None:
    before = a_step(RunState(), 4)
    after = before.after_growth((0, 0))
    grown = {"provenance": ((0, 0),), "operators": ((),), "finished_tokens": (4 * LENGTH,)}
    grown["stage_starts"] = ((4 * LENGTH, 4 * LENGTH),)
    assert after == replace(before, stage=1, stage_tokens=0, **grown)


def test_a_growth_is_charged_and_the_stream_goes_on_behind_it() -> None:
    before = a_step(a_step(RunState(), 4), 4)
    after = before.after_growth((0,), tokens=96, flops=10.0, flops_true=11.0)
    assert after.counters == Counters(
        step=2,
        tokens=2 * 4 * LENGTH + 96,
        flops=2 * 2.0 + 10.0,
        flops_true=2 * 3.0 + 11.0,
        elapsed_seconds=1.0,
        growth_tokens=96,
        growth_flops=10.0,
        growth_flops_true=11.0,
    )
    assert (after.stage, after.stage_tokens, after.provenance) == (1, 0, ((0,),))


part = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(parts=st.lists(part, min_size=1, max_size=4), data=st.data())
def test_state_and_config_agree_on_where_a_run_stands(
    parts: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Whatever the batches are and growths use: step, stage and tokens, at each step of the run."""
    run, state, spent = run_of(parts), RunState(), 0
    for stage, (steps, batch) in enumerate(parts):
        if stage:
            used = data.draw(st.integers(0, 100))
            state, spent = state.after_growth((0,), tokens=used), spent + used
        for _ in range(steps):
            step = state.counters.step
            done = state.stage_tokens // (batch * LENGTH)
            assert locate(run, step) == (state.stage, done)
            assert step + steps_left(run, state.stage, state.stage_tokens) == steps_left(run)
            assert state.counters.tokens == tokens_at(run, step) + spent
            assert sum(state.finished_tokens) == tokens_at(run, step) - state.stage_tokens
            state = a_step(state, batch)
    assert state.counters.step == steps_left(run)
    assert state.counters.tokens - state.counters.growth_tokens == run_tokens(run)
    assert state.counters.growth_tokens == spent


def test_a_state_survives_its_manifest() -> None:
    state = a_step(RunState(), 4).after_growth((0, 1), tokens=5, flops=1.5, flops_true=2.5)
    assert RunState.from_json(json.loads(json.dumps(state.as_json())), {}) == state


def test_tokens_of_finished_stages_are_recorded_and_derived() -> None:
    first = a_step(a_step(RunState(), 4), 3).after_growth((0,), tokens=50)
    second = a_step(first, 2).after_growth((0,))
    assert first.finished_tokens == (7 * LENGTH,)
    assert second.finished_tokens == (7 * LENGTH, 2 * LENGTH)

    def read_without(state: RunState) -> tuple[int, ...]:
        values = state.as_json()
        del values["finished_tokens"]
        return RunState.from_json(values, {}).finished_tokens

    assert read_without(a_step(first, 2)) == (7 * LENGTH,)
    assert read_without(second) == ()
    outside = RunState(stage=1)  # a model grown without a run
    assert read_without(outside) == a_step(outside, 2).after_growth((0,)).finished_tokens == ()


def test_a_manifest_that_knows_of_no_growth_tokens_is_read() -> None:
    values = RunState().as_json()
    for key in ("growth_tokens", "growth_flops", "growth_flops_true"):
        del values["counters"][key]
    assert RunState.from_json(values, {}) == RunState()


def test_a_rewind_changes_place_but_reads_on() -> None:
    saved = a_step(RunState(), 4)
    failed = a_step(a_step(saved, 4), 4)
    back = failed.rewound_to(saved)
    assert back.counters == replace(saved.counters, rewinds=1)
    assert (back.stage, back.stage_tokens) == (saved.stage, saved.stage_tokens)
    assert back.position == failed.position == 3 * 4 * LENGTH
    assert back.skipped_tokens == 2 * 4 * LENGTH
    again = a_step(back, 4).rewound_to(saved)
    assert (again.position, again.counters.rewinds) == (4 * 4 * LENGTH, 2)
    assert RunState.from_json(json.loads(json.dumps(again.as_json())), {}) == again


def test_a_manifest_that_knows_of_no_guards_is_read() -> None:
    values = RunState().as_json()
    for key in ("skipped_tokens", "guard"):
        del values[key]
    for key in ("rewinds", "skipped_steps"):
        del values["counters"][key]
    assert RunState.from_json(values, {}) == RunState()


def test_a_state_that_counts_steps_is_read_in_tokens() -> None:
    run = run_of([(2, 3), (5, 4)])
    values = RunState(Counters(tokens=1000), stage=1).as_json()
    del values["stage_tokens"]
    environment = {"config": run.model_dump(mode="json")}
    first = values | {"stage": 0, "stage_step": 999}  # with several batch sizes
    assert RunState.from_json(first, environment).stage_tokens == 1000
    state = RunState.from_json(values | {"stage_step": 3}, environment)
    assert (state.stage, state.stage_tokens) == (1, 3 * 4 * LENGTH)
    assert RunState.from_json(values | {"stage_step": 0}, {}).stage_tokens == 0
    with pytest.raises(CheckpointError, match="incomplete"):
        RunState.from_json(values | {"stage_step": 3}, {})


def test_a_stage_ends_by_its_tokens_after_a_change_of_the_batch() -> None:
    half = RunState(stage_tokens=10 * 4 * LENGTH)
    run, larger = run_of([(20, 4)]), run_of([(10, 8)])
    assert [steps_left(one, 0, half.stage_tokens) for one in (run, larger)] == [10, 5]
    assert steps_left(larger, 0, 80 * LENGTH) == steps_left(larger, 0, 90 * LENGTH) == 0
