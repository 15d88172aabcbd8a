"""Mixing time of synthetic curves."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.analysis.curves import Growth, RunCurves, Series, load_curves
from megagrow.analysis.mixing import Mixing, measure_mixing, mixing_times
from megagrow.analysis.report.conclusion import conclude, missing
from megagrow.analysis.report.content import Report
from megagrow.analysis.report.document import as_document
from megagrow.analysis.report.plots import plot_sections
from megagrow.analysis.report.tables import mixing_table
from megagrow.analysis.seeds import Matchup, SeedGroup

FIXED = [5.0, 4.0, 3.0, 2.5, 2.2, 2.0]
"""Losses after 10, 20, ... tokens; the grown runs grow at 20."""


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Callable[..., RunCurves]:
    base = load_curves(make_run("base", [(20, 1000)]))

    def make(name: str, losses: Sequence[float], growth: int | None = None) -> RunCurves:
        tokens = tuple(range(10, 10 * len(losses) + 1, 10))
        costs = tuple(map(float, tokens))
        series = Series(tokens, costs, costs, costs, tuple(losses))
        growths = (Growth(0, growth, *[float(growth)] * 3, "x"),) if growth else ()
        return replace(
            base,
            name=name,
            tokens=tokens[-1],
            train=series,
            train_unsmoothed=series.loss,
            validation=series,
            growths=growths,
        )

    return make


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # 1.0 above after 10 tokens, 0.25 below after 20: equal after 18.
        ([6, 5, 4.0, 2.25, 2.3, 1.9], Mixing(18.0, 2.6, -0.1, 40)),
        ([6, 5, 4.0, 2.50, 2.3, 2.1], Mixing(20.0, 2.5, 0.1, 40)),
        ([6, 1, 2.0, 3.00, 3.0, 3.0], Mixing(10, 2.0, 1.0, 40)),
        ([1, 1, 4.0, 3.00, 2.5], Mixing(None, None, 0.3, 30)),
        ([6, 5, 4.0, 2.75, 2.4, 2.1, 1.0, 0.5], Mixing(None, None, 0.1, 40)),
    ],
    ids=["between", "at a point, then above", "at once", "never", "after the other ended"],
)
def test_the_first_point_at_or_below_the_other_curve_counts(
    run: Callable[..., RunCurves], losses: list[float], expected: Mixing
) -> None:
    found = measure_mixing(run("grown", losses, growth=20), run("fixed", FIXED), "validation")
    assert found is not None and found.shared_tokens == expected.shared_tokens
    assert found.gap == pytest.approx(expected.gap)
    for value, wanted in ((found.tokens, expected.tokens), (found.loss, expected.loss)):
        assert value == (wanted if wanted is None else pytest.approx(wanted))


def matchup_of(grown: Sequence[RunCurves], fixed: RunCurves) -> Matchup:
    return Matchup(SeedGroup(tuple(grown)), SeedGroup((fixed,)))


def test_seeds_are_averaged_only_if_all_pairs_meet(run: Callable[..., RunCurves]) -> None:
    fast, slow, never = (
        run("grown", [6, 5, 4, *rest], growth=20)
        for rest in ((2.25, 2.0, 1.9), (3.5, 2.2, 1.9), (3.5, 3.0, 2.5))
    )
    fixed = run("fixed", FIXED)
    met = mixing_times(matchup_of([fast, slow], fixed))
    assert met is not None and met.tokens == pytest.approx((18 + 30) / 2)
    (row,) = mixing_table([met]).rows
    assert row[2:] == ["20", "40", "24", "18 to 30, 2 of 2 pairs", "-0.1000"]
    half = matchup_of([fast, never], fixed)
    sentence = conclude([half.grown, half.scratch], [half], [])[1]
    assert sentence == (
        "grown (2 seeds) does not meet the loss of fixed at equal tokens within the 40 tokens "
        "after its last growth that both runs have in 1 of 2 pairs: it ends +0.2000 from it."
    )


def test_a_report_has_the_value_in_text_table_json_and_plot(run: Callable[..., RunCurves]) -> None:
    grown, fixed = run("grown", [6, 5, 4, 2.25, 2, 1.9], growth=20), run("fixed", FIXED)
    report = Report([grown, fixed])
    assert any("18 tokens after its last growth (mixing time)" in t for t in report.conclusion)
    (values,) = as_document(report)["mixing_times"]
    assert (values["growth_tokens"], values["mixing_tokens"]) == (20, pytest.approx(18.0))
    assert any(table.title.startswith("Mixing time") for table in report.tables)
    axes = next(plot_sections(report)).panels["loss-tokens"].axes[0]
    (star,) = (line for line in axes.lines if line.get_marker() == "*")
    assert star.get_xydata().tolist() == [[pytest.approx(38.0), pytest.approx(2.6)]]


def test_it_is_unknown_if_the_other_run_ends_before_the_growth(
    run: Callable[..., RunCurves],
) -> None:
    pair = matchup_of([run("grown", [6, 5, 4, 2], growth=20)], run("fixed", FIXED[:2]))
    assert mixing_times(pair) is None
    assert any("ends before the growth" in line for line in missing([pair.grown], [pair]))
