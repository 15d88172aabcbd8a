"""Fault injection: a few kills, and detection of every kind of error."""

import json
import shutil
from pathlib import Path

import pytest

import tests.helpers.spawn  # noqa: F401  (imports all that a rank needs, before ranks are forked)
from tools.faults.inject import FaultInjection, plan_kills, show
from tools.faults.run import BASE_STEPS, STEPS, RunSnapshot, differences, read_snapshot

pytestmark = [pytest.mark.dist, pytest.mark.slow]

KILLS = 4

Injected = tuple[Path, FaultInjection]
"""Folder of the runs, and the injection."""


@pytest.fixture(scope="module")
def injected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FaultInjection]:
    folder = tmp_path_factory.mktemp("injected")
    injection = FaultInjection(folder, 2)
    injection.measure()
    injection.inject(plan_kills(KILLS, 3, 2))
    return folder, injection


def test_nothing_is_lost(injected: Injected, capsys: pytest.CaptureFixture) -> None:
    folder, injection = injected
    report = injection.report
    assert report.failures == []
    assert report.kills.total() == KILLS and report.runs >= 1
    for number in range(1, report.runs + 1):
        snapshot = read_snapshot(folder / f"run-{number}")
        assert (snapshot.step, snapshot.finished, snapshot.grown) == (STEPS, STEPS, True)
    show(report)
    assert f"{KILLS} kills of {report.runs} runs" in capsys.readouterr().out


def copied(injected: Injected, tmp_path: Path) -> tuple[Path, Path]:
    expected = injected[0] / "reference"
    shutil.copytree(expected, tmp_path / "run")
    assert differences(tmp_path / "run", expected) == []
    return tmp_path / "run", expected


def test_a_flipped_bit_is_detected(injected: Injected, tmp_path: Path) -> None:
    run, expected = copied(injected, tmp_path)
    path = run / "checkpoints" / f"step-{STEPS:09d}" / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (difference,) = differences(run, expected)
    assert "rank-00001.safetensors differs from the reference run" in difference


def test_another_loss_is_detected(injected: Injected, tmp_path: Path) -> None:
    run, expected = copied(injected, tmp_path)
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    next(r for r in records if r["kind"] == "train" and r["step"] == 9)["loss"] += 1e-9
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (difference,) = differences(run, expected)
    assert "train records" in difference


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (
            RunSnapshot(finished=9),
            RunSnapshot(starts=(6,), finished=9),
            "resumed from step 6 instead of 9",
        ),
        (RunSnapshot(finished=9), RunSnapshot(finished=6), "lost the checkpoint of step 9"),
        (RunSnapshot((0,), 8, finished=6), RunSnapshot((0, 6), finished=6), None),
        (RunSnapshot((0,), 8, finished=6), RunSnapshot((0, 9), finished=9), None),
    ],
)
def test_restarts_are_checked(
    injected: Injected,
    before: RunSnapshot,
    after: RunSnapshot,
    problem: str | None,
) -> None:
    injection = FaultInjection(injected[0], 2)
    injection._check(Path("run"), before, after)
    assert injection.report.failures == ([] if problem is None else [f"run: {problem}"])


def test_phases_follow_from_the_files() -> None:
    assert RunSnapshot().phase(0) == "start"
    assert RunSnapshot((0, 3), 3).phase(2) == "start"
    assert RunSnapshot((0,), 5).phase(0) == "steps"
    assert RunSnapshot((0,), 5, saving=True).phase(0) == "save"
    assert RunSnapshot((0,), BASE_STEPS).phase(0) == "growth"
    assert RunSnapshot((0,), BASE_STEPS, grown=True).phase(0) == "steps"


def test_the_same_seed_plans_the_same_kills() -> None:
    assert plan_kills(50, 1, 2) == plan_kills(50, 1, 2) != plan_kills(50, 2, 2)
    assert {kill.rank for kill in plan_kills(50, 1, 2)} == {None, 0, 1}
