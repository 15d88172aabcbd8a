"""Experiment on late growth: its runs are comparable, and its table has the paired intervals."""

from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.analysis.curves import Growth, load_curves
from megagrow.config.stage_length import stage_tokens
from megagrow.model.layers.flops import paper_flops_per_token
from megagrow.train.schedule import rate_at
from tests.helpers.written_runs import Stage, write_run
from tools.experiments.late_growth import (
    ARMS,
    STEP_TOKENS,
    LateGrowth,
    Results,
    Setting,
    as_json,
    finished,
    mixing,
    table,
)

EXPERIMENT = LateGrowth(Path("runs"), Path("corpus"), 250)
SCRATCH, LATE, ONE_LAYER, FIXED = (
    Setting(arm, "adamw") for arm in ("scratch", "late", "one-layer", "fixed")
)


@pytest.mark.parametrize("arm", ARMS)
def test_runs_have_equal_flops_and_one_schedule(arm: str) -> None:
    run = EXPERIMENT.run(Setting(arm, "adamw"), seed=1, lr=1e-3)
    (scratch,) = EXPERIMENT.run(SCRATCH, seed=1, lr=1e-3).stages
    flops = sum(stage_tokens(each) * paper_flops_per_token(each.model) for each in run.stages)
    wanted = stage_tokens(scratch) * paper_flops_per_token(scratch.model)
    step = STEP_TOKENS * paper_flops_per_token(scratch.model)
    assert arm == "fixed" or abs(flops - wanted) < step
    late = EXPERIMENT.run(LATE, seed=1, lr=1e-3)
    model = late.stages[0].model if arm == "one-layer" else scratch.model
    assert run.stages[-1].model == model
    last = len(run.stages) - 1
    assert rate_at(run, last, 0) == (1e-3 if last else rate_at(run, 0, 0))
    assert rate_at(run, last, run.stages[-1].tokens - STEP_TOKENS) < 1.4e-4
    assert {each.schedule for each in run.stages} == {run.stages[0].schedule}


def test_fixed_has_the_tokens_of_late() -> None:
    late, fixed = (EXPERIMENT.run(each, 1, 1e-3) for each in (LATE, FIXED))
    assert sum(map(stage_tokens, late.stages)) == stage_tokens(fixed.stages[0])
    assert late.stages[0].model.num_hidden_layers == 1


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Late is lower than scratch by 0.1, 0.2, 0.3, and meets fixed after half of the rest."""
    run = load_curves(write_run(tmp_path / "run", [Stage(40, 1000)]))

    def with_losses(loss: float, train: list[float] | None = None):
        series = replace(run.train, loss=tuple(train or run.train.loss))
        validation = replace(run.validation, loss=(*run.validation.loss[:-1], loss))
        growths = (Growth(0, 20_000, 0.0, 0.0, 0.0, "x"),)
        return replace(run, validation=validation, train=series, growths=growths)

    late = [3.0] * 30 + [1.0] * 10
    return {
        SCRATCH: [with_losses(2.0), with_losses(2.2), with_losses(2.4)],
        LATE: [with_losses(loss, late) for loss in (1.9, 2.0, 2.1)],
        ONE_LAYER: [with_losses(loss) for loss in (1.8, 1.9, 2.0)],
        FIXED: [with_losses(loss, [2.0] * 40) for loss in (1.9, 2.0, 2.1)],
    }


def test_differences_are_paired_by_seed(results: Results) -> None:
    scratch, late, one_layer, _ = (
        line[2:-2].split(" | ") for line in table(results).splitlines()[2:]
    )
    # Mean -0.2, deviation 0.1: t(2) = 4.303, 4.303 x 0.1 / sqrt(3) = 0.2484.
    assert scratch[3:] == ["2.2000 +- 0.2000", "-", "+0.3000 +- 0.2484 *"]
    assert late[3:] == ["2.0000 +- 0.1000", "-0.2000 +- 0.2484", "+0.1000 +- 0.0000 *"]
    assert one_layer[3:] == ["1.9000 +- 0.1000", "-0.3000 +- 0.2484 *", "-"]


def test_the_mixing_time_is_a_share_of_the_rest(results: Results) -> None:
    assert mixing(results, "adamw") == [pytest.approx(10_500 / 20_000)] * 3
    assert '"mixing_share"' in as_json({"adamw": {1e-3: 2.0}}, results)


def test_unfinished_runs_are_trained_again(tmp_path: Path) -> None:
    experiment = LateGrowth(tmp_path, Path("corpus"), 250)
    run = experiment.run(SCRATCH, 1, 1e-3)
    assert finished(run) is None
    write_run(run.output_dir, [Stage(20, 1000)], end=False)
    assert finished(run) is None
