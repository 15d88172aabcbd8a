"""Scaling laws and FLOP savings fitted to losses with known laws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.errors import InputError
from megagrow.fits.data import Data, ScalingPoint
from megagrow.fits.scaling import fit_scaling, saving_at
from tests.helpers.fits.synthetic import (
    GROWN_LAW,
    SCALING_BUDGETS,
    SCALING_HEADER,
    SCRATCH_LAW,
    scaling_points,
    write_csv,
)

TRUE_SAVING = (GROWN_LAW[0] / SCRATCH_LAW[0]) ** (1 / SCRATCH_LAW[1]) - 1
"""Both laws have the same exponent and floor, so the FLOP ratio is the same at every budget."""


@pytest.mark.parametrize("floor", [True, False])
def test_exact_losses_give_laws_and_saving_back(floor: bool) -> None:
    laws = fit_scaling(scaling_points(floor=floor), floor)
    for law, (a, b, e) in zip(laws, (SCRATCH_LAW, GROWN_LAW), strict=True):
        found = (law.a.value, law.b.value, law.e.value)
        assert found == pytest.approx((a, b, e if floor else 0.0), rel=1e-5)
    for flops in (1e19, 1e21, 1e23):
        saving = saving_at(*laws, flops)
        assert saving.saving == pytest.approx(TRUE_SAVING, rel=1e-4)
        assert saving.scratch_flops == pytest.approx(flops * (1 + TRUE_SAVING), rel=1e-4)
        assert saving.beyond_grown == pytest.approx(flops / SCALING_BUDGETS[-1])


def test_noisy_losses_give_them_within_their_intervals() -> None:
    """Constants, the extrapolated band and the saving cover the true values at the 95% level."""
    inside, banded, saved, at = 0, 0, 0, np.array([1e23])
    a, b, e = SCRATCH_LAW
    for seed in range(40):
        laws = fit_scaling(scaling_points(noise=0.004, seed=seed, repeats=2))
        scratch = laws[0]
        for found, true in zip((scratch.a, scratch.b, scratch.e), SCRATCH_LAW, strict=True):
            assert found.low is not None and found.high is not None
            inside += found.low <= true <= found.high
        band = scratch.band(at)
        assert band is not None
        banded += band[0][0] <= a * 1e23**b + e <= band[1][0]
        saving = saving_at(*laws, 1e21)
        assert saving.low is not None and saving.high is not None
        saved += saving.low <= TRUE_SAVING <= saving.high
    # 95% are expected; the three constants are correlated.
    assert 104 <= inside <= 120 and banded >= 34 and saved >= 34
    assert inside < 120 or banded < 40 or saved < 40


def test_a_loss_below_the_floor_of_scratch_has_no_saving() -> None:
    points = [
        ScalingPoint(kind, c, a * c**-0.16 + e)
        for kind, a, e in (("scratch", 1600.0, 2.2), ("grown", 1500.0, 1.7))
        for c in SCALING_BUDGETS
    ]  # fmt: skip
    saving = saving_at(*fit_scaling(Data("made", tuple(points))), 1e23)
    assert saving.scratch_flops is None and saving.saving is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (scaling_points(budgets=(1e17, 1e18)), "scratch has points at 2 different budgets, but"),
        (
            Data("made", tuple(ScalingPoint(k, 10.0**c, 2.0 + c / 100)
                               for k in ("scratch", "grown") for c in range(17, 22))),
            "the scratch losses do not",
        ),
    ],
)  # fmt: skip
def test_undetermined_laws_raise(data: Data[ScalingPoint], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_scaling(data)


def test_from_a_csv_through_the_command_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "runs.csv", SCALING_HEADER, scaling_points(noise=1e-4).points)
    words = ["fit", "scaling", str(path), "--output", str(tmp_path / "o"), "--budgets", "1e20,1e22"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "o" / "scaling.json").read_text())
    assert [one["flops"] for one in document["savings"]] == [1e20, 1e22]
    for one in document["savings"]:
        assert one["low"] <= TRUE_SAVING <= one["high"]
        assert math.isclose(one["beyond_grown"], one["flops"] / 1e21, rel_tol=1e-9)
    assert (tmp_path / "o" / "scaling.png").stat().st_size > 10_000
