"""Recommended growth factor fitted to losses with a known best factor."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.errors import InputError
from megagrow.fits.parabola import factor_parabolas, fit_factor
from tests.helpers.fits.synthetic import ISO_HEADER, factor_points, write_csv


@pytest.mark.parametrize("best", [2.5, 4.0, 9.0])
def test_exact_losses_give_the_best_factor_back(best: float) -> None:
    data = factor_points(best)
    fit = fit_factor(data, factor_parabolas(data))
    assert fit.factor == pytest.approx(best, rel=1e-6)
    assert fit.nearest_tried == {2.5: 3, 4.0: 4, 9.0: 8}[best]


def test_noisy_losses_give_it_within_the_interval() -> None:
    inside = 0
    for seed in range(40):
        data = factor_points(4.0, noise=0.001, seed=seed)
        fit = fit_factor(data, factor_parabolas(data))
        assert fit.low is not None and fit.high is not None
        inside += fit.low <= 4.0 <= fit.high
        assert 3.0 < fit.factor < 5.3
    assert 34 <= inside <= 40  # 38 are expected


def test_a_best_factor_outside_the_tried_range_raises() -> None:
    data = factor_points(40.0)
    with pytest.raises(
        InputError, match=r"no parabola has a best g \(minimum outside the tried range of g"
    ):
        fit_factor(data, factor_parabolas(data))


def test_from_a_csv_through_the_command_line(tmp_path: Path) -> None:
    points = factor_points(3.0, factors=(1, 2, 3, 4, 8)).points
    path = write_csv(tmp_path / "runs.csv", ISO_HEADER.format("factor"), points)
    result = CliRunner().invoke(app, ["fit", "factor", str(path), "--output", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert "9 points with factor <= 1 excluded" in result.output
    document = json.loads((tmp_path / "o" / "factor.json").read_text())
    assert document["fit"]["factor"] == pytest.approx(3.0, rel=1e-6)
    assert document["paper"] == [2.0, 4.0]
    assert (tmp_path / "o" / "factor.png").stat().st_size > 10_000
