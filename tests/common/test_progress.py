"""Progress of a phase: log lines with the time left, none for short phases."""

import pytest

from megagrow.common import progress
from megagrow.common.progress import SECONDS_BETWEEN_LINES, PhaseProgress
from tests.helpers.logs import captured_logs


def test_lines_appear_at_intervals_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with captured_logs() as lines:
        phase = PhaseProgress("validation", 100, "passes")
        for _ in range(20):
            now += SECONDS_BETWEEN_LINES / 4
            phase.advance(2)
    assert len(lines) == 5
    assert lines[0] == "validation | 8 of 100 passes | 58s left"
    assert lines[-1] == "validation | 40 of 100 passes | 38s left"


def test_short_phases_log_nothing() -> None:
    with captured_logs() as lines:
        phase = PhaseProgress("validation", 3, "passes")
        for _ in range(3):
            phase.advance()
    assert lines == []
