"""Progress bar on a terminal, progress lines in a log."""

import io

import pytest
from rich.console import Console

from megagrow.common import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_megabytes_tokens_and_time_left(monkeypatch, terminal):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with progress.TokenizingProgress(console, 4_000_000) as shown:
        shown.resume(1_000_000, 300_000)
        shown.advance(1_000_000, 250_000)
    output = console.file.getvalue()
    assert "2.0/4.0 MB, 0.55M tokens" in output and "left" in output
    assert terminal or output.count("\n") == 2
