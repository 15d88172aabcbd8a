"""The page of simulated memory: written, current, and recognized as out of date."""

import sys
from pathlib import Path

import pytest

from megagrow.planning.simulated import SimulatedStage
from tools.docs import generated_page, simulated_memory
from tools.docs.hardware_profiles import Profile, read_profile
from tools.docs.simulated_memory import BEGIN, END, MACHINE, PAGE

PROFILES = [read_profile(name) for name in ("1xh200-410m", f"{MACHINE}-410m")]
"""The second one is reported in full."""


@pytest.fixture(scope="module")
def simulated() -> dict[Profile, SimulatedStage]:
    return {profile: simulated_memory._simulate(profile) for profile in PROFILES}


@pytest.fixture
def page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: dict[Profile, SimulatedStage]
) -> Path:
    """Page of these profiles only, without tables."""
    path = tmp_path / "page.md"
    path.write_text(f"Before.\n\n{BEGIN}\n{END}\n\nAfter.\n")
    monkeypatch.setattr(generated_page, "ROOT", tmp_path)
    monkeypatch.setattr(simulated_memory, "PAGE", path)
    monkeypatch.setattr(simulated_memory, "hardware_profiles", lambda: PROFILES)
    monkeypatch.setattr(simulated_memory, "_simulate", simulated.__getitem__)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["simulated_memory.py", *options])
    return simulated_memory.main()


def test_a_stale_page_is_detected(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--check") == 1
    assert capsys.readouterr().err.startswith("page.md is out of date; run: python tools/docs/")
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n")
    page.write_text(text.replace("| weights, GiB | 0.7 |", "| weights, GiB | 0.8 |"))
    assert page.read_text() != text
    assert run(monkeypatch, "--check") == 1


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_figures_of_these_profiles_are_current(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all profiles take minutes: `tools/docs/simulated_memory.py --check`."""
    run(monkeypatch)
    committed, found = rows(PAGE.read_text()), rows(page.read_text())
    assert len(found) > 20
    for row in found:  # of the reports, the first column is that of the second profile
        assert any(row == other[: len(row)] for other in committed), row
