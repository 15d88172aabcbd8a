"""The harness that kills a run: a few kills here, and that it would see what it looks for."""

import json
import shutil
from pathlib import Path

import pytest

import tests.helpers.spawn  # noqa: F401  (imports all that a rank needs, before ranks are forked)
from tools.faults.inject import Injection, plan_kills, show
from tools.faults.run import BASE_STEPS, STEPS, Seen, differences, look

pytestmark = [pytest.mark.dist, pytest.mark.slow]

KILLS = 4


@pytest.fixture(scope="module")
def injected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Injection]:
    folder = tmp_path_factory.mktemp("injected")
    injection = Injection(folder, 2)
    injection.measure()
    injection.inject(plan_kills(KILLS, 3, 2))
    return folder, injection


def test_nothing_is_lost(injected: tuple[Path, Injection], capsys: pytest.CaptureFixture) -> None:
    folder, injection = injected
    report = injection.report
    assert report.failures == []
    assert report.kills.total() == KILLS and report.runs >= 1
    for number in range(1, report.runs + 1):
        seen = look(folder / f"run-{number}")
        assert (seen.step, seen.finished, seen.grown) == (STEPS, STEPS, True)
    show(report)
    assert f"{KILLS} kills of {report.runs} runs" in capsys.readouterr().out


def copied(injected: tuple[Path, Injection], tmp_path: Path) -> tuple[Path, Path]:
    expected = injected[0] / "undisturbed"
    shutil.copytree(expected, tmp_path / "run")
    assert differences(tmp_path / "run", expected) == []
    return tmp_path / "run", expected


def test_a_flipped_bit_would_be_seen(injected: tuple[Path, Injection], tmp_path: Path) -> None:
    run, expected = copied(injected, tmp_path)
    path = run / "checkpoints" / f"step-{STEPS:09d}" / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (found,) = differences(run, expected)
    assert "rank-00001.safetensors not as in the undisturbed run" in found


def test_another_loss_would_be_seen(injected: tuple[Path, Injection], tmp_path: Path) -> None:
    run, expected = copied(injected, tmp_path)
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    next(r for r in records if r["kind"] == "train" and r["step"] == 9)["loss"] += 1e-9
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (found,) = differences(run, expected)
    assert "train records" in found


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (Seen(finished=9), Seen(starts=(6,), finished=9), "went on from step 6, not from 9"),
        (Seen(finished=9), Seen(finished=6), "lost the checkpoint of step 9"),
        (Seen((0,), 8, finished=6), Seen((0, 6), finished=6), None),
        (Seen((0,), 8, finished=6), Seen((0, 9), finished=9), None),
    ],
)
def test_what_is_seen_after_a_start(
    injected: tuple[Path, Injection], before: Seen, after: Seen, said: str | None
) -> None:
    injection = Injection(injected[0], 2)
    injection._check(Path("run"), before, after)
    assert injection.report.failures == ([] if said is None else [f"run: {said}"])


def test_phases_are_told_from_the_files() -> None:
    assert Seen().phase(0) == "start"
    assert Seen((0, 3), 3).phase(2) == "start"
    assert Seen((0,), 5).phase(0) == "steps"
    assert Seen((0,), 5, saving=True).phase(0) == "save"
    assert Seen((0,), BASE_STEPS).phase(0) == "growth"
    assert Seen((0,), BASE_STEPS, grown=True).phase(0) == "steps"


def test_the_same_seed_plans_the_same_kills() -> None:
    assert plan_kills(50, 1, 2) == plan_kills(50, 1, 2) != plan_kills(50, 2, 2)
    assert {kill.rank for kill in plan_kills(50, 1, 2)} == {None, 0, 1}
