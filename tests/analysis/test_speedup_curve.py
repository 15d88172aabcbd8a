"""Speedups at all shared losses and over seeds, compared with values computed by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.analysis.curves import RunCurves, load_curves
from megagrow.analysis.seeds import group_runs, match_groups
from megagrow.analysis.speedup import LossCurve
from megagrow.analysis.speedup_curve import Level, shared_losses, speedup_curve_levels

SCRATCH = LossCurve((1e10, 1e11, 1e12, 1e13), (5.0, 4.0, 3.0, 2.0))


def faster(by: float) -> LossCurve:
    """Return the same losses, reached with FLOPs divided by `by`."""
    return LossCurve(tuple(flops / by for flops in SCRATCH.flops), SCRATCH.loss)


def test_every_level_is_measured() -> None:
    levels = speedup_curve_levels([SCRATCH], [faster(1.5)], count=5)
    assert [level.loss for level in levels] == pytest.approx([3.0, 2.75, 2.5, 2.25, 2.0])
    assert [level.mean for level in levels] == pytest.approx([0.5] * 5)
    assert [level.saved for level in levels] == pytest.approx([1 / 3] * 5)
    assert {level.deviation for level in levels} == {None}


def test_a_shrinking_gain_is_measured() -> None:
    """Faster by a quarter until loss 3, equally fast at 2."""
    grown = LossCurve((8e9, 8e10, 8e11, 1e13), SCRATCH.loss)
    levels = speedup_curve_levels([SCRATCH], [grown], count=3)
    assert [level.mean for level in levels] == pytest.approx([0.25, 1.25**0.5 - 1, 0.0])


def test_seeds_give_mean_range_and_deviation() -> None:
    (level,) = speedup_curve_levels([SCRATCH], [faster(1.4), faster(1.6)], count=1)
    assert level.speedups == pytest.approx((0.4, 0.6))
    assert level.mean == pytest.approx(0.5)
    assert level.deviation == pytest.approx(0.02**0.5)


def test_papers_fewer_tokens() -> None:
    """sp 54.6% is 35.3% fewer (PAPER section 5)."""
    assert Level(2.0, (0.546,)).saved == pytest.approx(0.353, abs=5e-4)


def test_curves_that_share_no_loss_have_no_level() -> None:
    low = LossCurve((1.0, 2.0), (1.5, 1.0))
    assert speedup_curve_levels([SCRATCH], [low]) == []
    assert speedup_curve_levels([low], [SCRATCH]) == []


def test_levels_exclude_the_steep_start() -> None:
    assert shared_losses([SCRATCH], 3) == [3.0, 2.5, 2.0]


def runs_of(make_run: Callable[..., Path], *names: str) -> dict[str, RunCurves]:
    grown, scratch = [(20, 1000), (40, 4000, 1e8)], [(45, 4000)]
    return {
        name: load_curves(make_run(name, grown if name.startswith("grown") else scratch))
        for name in names
    }


def test_runs_that_differ_by_seed_are_one_group(make_run: Callable[..., Path]) -> None:
    runs = runs_of(make_run, "grown", "scratch", "grown-again")
    other = replace(runs["grown-again"], seed=2)
    groups = group_runs([runs["grown"], runs["scratch"], other])
    assert [group.name for group in groups] == ["grown (2 seeds)", "scratch"]
    same_seed = group_runs([runs["grown"], runs["scratch"], runs["grown-again"]])
    assert [group.name for group in same_seed] == ["grown", "scratch", "grown-again"]
    (matchup,) = match_groups(groups)
    assert not matchup.single
    assert set(matchup.levels) == {"flops", "flops_true"}
    last = matchup.levels["flops"][-1]
    assert len(last.speedups) == 2 and last.deviation == pytest.approx(0.0, abs=1e-12)


def test_group_without_counterpart_is_left_out(make_run: Callable[..., Path]) -> None:
    assert match_groups(group_runs(list(runs_of(make_run, "grown").values()))) == []
