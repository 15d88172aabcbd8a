"""Errors of `megagrow fit` for invalid input: one line, with file, line and column."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.errors import InputError

TIMING = "parameters,flops,base_tokens,loss"


def refusal(*words: str) -> str:
    """Return the one-line error of the command."""
    error = CliRunner().invoke(app, ["fit", *words]).exception
    assert isinstance(error, InputError), error
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters,flops,loss\n1,1,1", "line 1: column 'base_tokens' is missing"),
        (
            f"{TIMING}\n1e9,1e20,much,2",
            "line 2, column 'base_tokens': 'much' is not a finite number",
        ),
        (f"{TIMING}\n1e9,1e20,1e9,nan", "line 2, column 'loss': 'nan' is not a finite number"),
        (f"{TIMING}\n1e9,1e20,1e9,2\n1e9,-1,1e9,2", "line 3, column 'flops': -1 is negative"),
        (f"{TIMING}\n1e9,1e20,1e9", "line 2: 3 cells for 4 columns"),
        (f"{TIMING},seed\n1e9,1e20,1e9,2,x", "line 2, column 'seed': 'x' is not an integer"),
        (f"{TIMING},loss\n1e9,1e20,1e9,2,2", "line 1: column 'loss' is duplicated"),
        (TIMING, "no lines below the header"),
        ("", "line 1: column 'parameters' is missing"),
    ],
)
def test_csv_error_has_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    error = refusal("timing", str(path), "--output", str(tmp_path))
    assert error.startswith(str(path)) and message in error


def test_unknown_kind_raises(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("kind,flops,loss\nstacked,1e17,3", encoding="utf-8")
    error = refusal("scaling", str(path), "--output", str(tmp_path))
    assert "line 2, column 'kind': 'stacked' is neither scratch nor grown" in error


def test_invalid_sources_raise(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(TIMING, encoding="utf-8")
    out = ("--output", str(tmp_path))
    assert "no such file or directory" in refusal("timing", str(tmp_path / "none"), *out)
    assert "is a file" in refusal("timing", str(path), str(tmp_path), *out)
    assert "metrics.jsonl" in refusal("timing", str(tmp_path), *out, "--budgets", "1e17")
    assert "'x' is not a positive number" in refusal(
        "timing", str(tmp_path), *out, "--budgets", "1e17,x"
    )
    assert "has its own column" in refusal("timing", str(path), *out, "--budgets", "1e17")
