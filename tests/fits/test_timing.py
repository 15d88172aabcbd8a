"""Constants of equation 2 fitted to losses generated from it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.config.growth_guidelines import growth_tokens
from megagrow.errors import InputError
from megagrow.fits.data import Data, IsoPoint
from megagrow.fits.parabola import accepted
from megagrow.fits.timing import TimingFit, fit_timing, timing_parabolas
from tests.helpers.analysis.images import colors
from tests.helpers.fits.synthetic import (
    BUDGETS,
    ISO_HEADER,
    PAPER,
    SIZES,
    TIMINGS,
    best_tokens,
    iso_loss,
    timing_points,
    write_csv,
)

TABLE_4 = ((8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9))
"""N, D and the recommended d published in the paper (Table 4)."""


def fitted(data: Data[IsoPoint]) -> TimingFit:
    return fit_timing(data.source, timing_parabolas(data))


def values(fit: TimingFit) -> tuple[float, float, float]:
    return fit.a.value, fit.b.value, fit.c.value


@pytest.mark.parametrize("constants", [PAPER, (0.5, -40.0, 7.0)])
def test_exact_losses_give_the_constants_back(constants: tuple[float, float, float]) -> None:
    assert values(fitted(timing_points(constants=constants))) == pytest.approx(constants, rel=1e-6)


@pytest.mark.parametrize(("noise", "repeats"), [(0.002, 1), (0.004, 2)])
def test_noisy_losses_give_them_within_their_intervals(noise: float, repeats: int) -> None:
    inside, errors = 0, []
    for seed in range(40):
        fit = fitted(timing_points(noise=noise, seed=seed, repeats=repeats))
        for found, true in zip((fit.a, fit.b, fit.c), PAPER, strict=True):
            assert found.low is not None and found.high is not None and found.standard_error
            inside += found.low <= true <= found.high
            errors.append((found.value - true) / found.standard_error)
    # 114 of 120 are expected; the three of a fit are correlated, so 5 fewer is not rare.
    assert 106 <= inside < 120
    assert abs(sum(errors) / len(errors)) < 0.4


def test_several_seeds_narrow_the_intervals() -> None:
    one, four = (
        [fitted(timing_points(noise=0.002, seed=seed, repeats=n)).a for seed in range(10)]
        for n in (1, 4)
    )
    narrower = [b.standard_error / a.standard_error for a, b in zip(one, four, strict=True)]
    assert 0.3 < sum(narrower) / 10 < 0.8


def test_the_papers_table_of_recommended_timings() -> None:
    points = [
        IsoPoint(size, 6 * size * tokens, best * 10**shift,
                 iso_loss(size, 6 * size * tokens, 10**shift,
                          best_tokens(size, 6 * size * tokens) / best))
        for size, tokens, best in TABLE_4 for shift in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]  # fmt: skip
    fit = fitted(Data("table", tuple(points)))
    assert values(fit) == pytest.approx(PAPER, rel=1e-6)
    for size, tokens, printed in TABLE_4:
        assert fit.growth_tokens(size, 6 * size * tokens) == pytest.approx(printed, rel=1e-3)
        assert growth_tokens(size, tokens) == pytest.approx(printed, rel=1e-3)


def test_the_error_of_a_vertex_is_that_of_repeated_draws() -> None:
    found, predicted = [], []
    for seed in range(150):
        first = timing_parabolas(timing_points(noise=0.002, seed=seed))[0]
        assert first.best is not None and first.standard_error is not None
        found.append(math.log10(first.best))
        predicted.append(first.standard_error)
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((one - mean) ** 2 for one in found) / (len(found) - 1))
    assert sum(predicted) / len(predicted) == pytest.approx(spread, rel=0.2)
    assert mean == pytest.approx(math.log10(best_tokens(SIZES[0], BUDGETS[0])), abs=0.01)


def test_parabolas_without_a_best_choice_are_refused() -> None:
    data = timing_points()
    far, up, few = ((SIZES[0], flops) for flops in BUDGETS)
    points = []
    for point in data.points:
        place, d = (point.parameters, point.flops), point.choice
        if (place == far and d > 5e9) or (place == few and not 2e9 < d < 5e9):
            continue
        loss = 8.0 - point.loss if place == up else point.loss
        points.append(IsoPoint(*place, d, loss))
    parabolas = timing_parabolas(Data("made", tuple(points)))
    assert [one.refused for one in parabolas[:3]] == [
        "minimum outside the tried range of d, 1e+09 to 3.16e+09",
        "no minimum: the curvature is not positive",
        "only 1 distinct values of d, at least 3 are required",
    ]
    assert len(accepted(parabolas)) == 6
    assert values(fit_timing("made", parabolas)) == pytest.approx(PAPER, rel=1e-6)


def test_as_many_vertices_as_constants_have_no_interval() -> None:
    corner = {(SIZES[0], BUDGETS[0]), (SIZES[0], BUDGETS[1]), (SIZES[1], BUDGETS[0])}
    corners = [p for p in timing_points().points if (p.parameters, p.flops) in corner]
    fit = fitted(Data("made", tuple(corners)))
    assert values(fit) == pytest.approx(PAPER, rel=1e-6)
    assert fit.a.low is None and fit.residual is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (timing_points(sizes=[1e9]), "only one size, N = 1e+09, has points to fit, so a is not"),
        (
            timing_points(budgets=[1e20]),
            "only one budget, C = 1e+20, has points to fit, so b is not",
        ),
        (
            timing_points(timings=[1e9, 1e11]),
            "0 of 9 parabolas have a best d, but fitting 3 constants requires 3",
        ),
    ],
)
def test_undetermined_constants_raise(data: Data[IsoPoint], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        fitted(data)


def test_sizes_and_budgets_that_vary_together() -> None:
    pairs = [(10**n, 10 ** (1 / (0.05 - 0.001 * n))) for n in (8.0, 8.5, 9.0, 9.5)]
    points = [
        IsoPoint(size, flops, d, iso_loss(size, flops, d, 1e10))
        for size, flops in pairs for d in TIMINGS
    ]  # fmt: skip
    with pytest.raises(InputError, match="a and b are not identifiable"):
        fitted(Data("made", tuple(points)))


def test_from_a_csv_through_the_command_line(tmp_path: Path) -> None:
    points = timing_points(noise=0.0005, seed=3, repeats=2).points
    scratch = [IsoPoint(SIZES[0], flops, 0.0, 3.9) for flops in BUDGETS]
    path = write_csv(tmp_path / "runs.csv", ISO_HEADER.format("base_tokens"), [*points, *scratch])
    result = CliRunner().invoke(app, ["fit", "timing", str(path), "--output", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert "3 points with base_tokens <= 0 excluded" in result.output
    assert "163.27" in result.output and "-5.74" in result.output
    document = json.loads((tmp_path / "o" / "timing.json").read_text())
    for name, true in zip("abc", PAPER, strict=True):
        assert document["paper"][name] == true
        assert document["fit"][name]["low"] <= true <= document["fit"][name]["high"]
    assert [p["points"] for p in document["parabolas"]] == [20] * 9
    assert {"#D55E00", "#0072B2", "#009E73"} <= colors(tmp_path / "o" / "timing.png")


def test_from_run_directories(grown_run: Callable[..., Path], tmp_path: Path) -> None:
    """N from the run's config, d from its growth, losses interpolated between its records."""
    best = {4: 2e4, 8: 4e4}
    runs = [
        grown_run(f"{layers}-{steps}", (layers // 4, layers), steps, 1000.0 * steps / best[layers])
        for layers in best for steps in (10, 20, 40, 80)
    ]  # fmt: skip
    words = ["fit", "timing", *map(str, runs), "--output", str(tmp_path / "o"), "--budgets"]
    result = CliRunner().invoke(app, [*words, "8e9,1.0003e10,1e12"])
    assert result.exit_code == 0, result.output
    assert result.output.count("the budget 1e+12 FLOPs is not between") == 8
    document = json.loads((tmp_path / "o" / "timing.json").read_text())
    # 4 H^2 + 3 H F in a layer with 2 norms, and the last norm: H = 128 and F = 352 in the demo.
    sizes = [layers * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128 for layers in best]
    parabolas = document["parabolas"]
    assert [p["parameters"] for p in parabolas] == [sizes[0]] * 2 + [sizes[1]] * 2
    assert [p["tried"] for p in parabolas] == [[1e4, 8e4]] * 4
    for parabola, true in zip(parabolas, (2e4, 2e4, 4e4, 4e4), strict=True):
        assert parabola["best"] == pytest.approx(true, rel=0.03)
    slope = math.log10(2) / math.log10(sizes[1] / sizes[0])
    assert document["fit"]["a"]["value"] == pytest.approx(slope, rel=0.05)
    no_budgets = CliRunner().invoke(app, words[:-1])
    assert "--budgets is missing" in str(no_budgets.exception)
