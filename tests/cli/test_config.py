"""`megagrow config`, `--version`, and run files that are given by name."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megagrow import __version__
from megagrow.cli.app import app
from tests.helpers.source_tree import ROOT


def ran(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def test_every_shipped_file_is_listed_with_its_first_comment() -> None:
    listed = ran("config", "ls").output
    for file in (ROOT / "configs").rglob("*.yaml"):
        folder = file.parent.name
        name = f"{folder}/{file.stem}" if folder in ("demo", "large") else file.stem
        comment = file.read_text("utf-8").splitlines()[0].removeprefix("# ")
        assert any(name in line.split() and comment in line for line in listed.splitlines()), file


def test_hidden_files_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.yaml").write_text("# my run\n", "utf-8")
    (tmp_path / "configs" / ".#own.yaml").symlink_to("a-process-that-edits-it")
    monkeypatch.chdir(tmp_path)
    listed = ran("config", "ls").output
    assert "my run" in listed and ".#own" not in listed


@pytest.mark.parametrize("name", ["gstack-1.1b", "demo/gstack"])
def test_a_run_file_is_found_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = ran("config", "show", name).output
    assert shown == ran("config", "show", str(ROOT / "configs" / f"{name}.yaml")).output
    assert f"name: {name.replace('/', '-')}" in shown


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    error = ran("plan", "gstack-1.1").exception
    assert "did you mean 'gstack-1.1b'?" in str(error)


def test_the_schema_is_json() -> None:
    assert json.loads(ran("config", "schema").output)["properties"].keys() >= {"model", "stages"}


def test_the_version() -> None:
    assert ran("--version").output == f"megagrow {__version__}\n"
