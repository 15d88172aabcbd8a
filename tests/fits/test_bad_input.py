"""What `megagrow fit` says of input that it cannot use: one line, with file, line and column."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.errors import InputError

TIMING = "parameters,flops,base_tokens,loss"


def refusal(*words: str) -> str:
    """The one line with which the command ends."""
    error = CliRunner().invoke(app, ["fit", *words]).exception
    assert isinstance(error, InputError), error
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameters,flops,loss\n1,1,1", "line 1: column 'base_tokens' is missing"),
        (f"{TIMING}\n1e9,1e20,much,2", "line 2, column 'base_tokens': 'much' is no finite number"),
        (f"{TIMING}\n1e9,1e20,1e9,nan", "line 2, column 'loss': 'nan' is no finite number"),
        (f"{TIMING}\n1e9,1e20,1e9,2\n1e9,-1,1e9,2", "line 3, column 'flops': -1 is negative"),
        (f"{TIMING}\n1e9,1e20,1e9", "line 2: 3 cells for 4 columns"),
        (f"{TIMING},seed\n1e9,1e20,1e9,2,x", "line 2, column 'seed': 'x' is no whole number"),
        (f"{TIMING},loss\n1e9,1e20,1e9,2,2", "line 1: column 'loss' stands there twice"),
        (TIMING, "no line below its header"),
        ("", "line 1: column 'parameters' is missing"),
    ],
)
def test_a_csv_is_named_with_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    found = refusal("timing", str(path), "--output", str(tmp_path))
    assert found.startswith(str(path)) and said in found


def test_a_kind_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("kind,flops,loss\nstacked,1e17,3", encoding="utf-8")
    found = refusal("scaling", str(path), "--output", str(tmp_path))
    assert "line 2, column 'kind': 'stacked' is neither scratch nor grown" in found


def test_what_is_no_source_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(TIMING, encoding="utf-8")
    out = ("--output", str(tmp_path))
    assert "is not there" in refusal("timing", str(tmp_path / "none"), *out)
    assert "is a file" in refusal("timing", str(path), str(tmp_path), *out)
    assert "metrics.jsonl" in refusal("timing", str(tmp_path), *out, "--budgets", "1e17")
    assert "'x' is no number" in refusal("timing", str(tmp_path), *out, "--budgets", "1e17,x")
    assert "has its own column" in refusal("timing", str(path), *out, "--budgets", "1e17")
