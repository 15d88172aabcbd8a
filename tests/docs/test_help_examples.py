"""Run each example of `--help`: the texts of options that contain "such as VALUE"."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.data.prepare import prepare
from megagrow.errors import DataError

ROOT = Path(__file__).resolve().parents[2]

ARGUMENTS = {
    "train": "RUN.yaml --dry-run",
    "plan": "RUN.yaml",
    "init": "data/stdlib --size 3M --output new.yaml",
    "config show": "RUN.yaml",
    "doctor": "--run RUN.yaml",
    "prepare": "none --output out --tokenizer train",
    "fit timing": "none --output out",
    "fit factor": "none --output out",
}
"""The other arguments of each command. Missing sources stand for large ones: the examples of their
options have been parsed when the source is opened."""


def examples(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from examples(inner, (*names, name))
    for option in command.params:
        for value in re.findall(r"such as (\S+)", getattr(option, "help", None) or ""):
            yield " ".join(names), option.opts[0], value.rstrip(".,;")


EXAMPLES = list(examples(typer.main.get_command(app)))


def test_the_examples_are_found() -> None:
    assert ("plan", "--cluster", "h100:4x1") in EXAMPLES
    assert {command for command, _, _ in EXAMPLES} == ARGUMENTS.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run file of README.md and a small corpus under the name that it has."""
    folder, text = tmp_path_factory.mktemp("examples"), tmp_path_factory.mktemp("text")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (run_file,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    (folder / "RUN.yaml").write_text(run_file)
    for number in range(40):
        (text / f"{number}.txt").write_text(f"This is document {number} of the corpus.\n" * 40)
    out = folder / "data/stdlib"
    prepare([str(text)], out, "train", 300, validation_fraction=0.2, workers=1)
    return folder


@pytest.mark.parametrize(("command", "option", "value"), EXAMPLES)
def test_an_example_of_the_help_runs(
    command: str, option: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = [*command.split(), *ARGUMENTS[command].split(), option, value]
    words += ["--gpu", "h100"] if option == "--mfu" else []
    done = CliRunner().invoke(app, words)
    if "none" in words:
        assert isinstance(done.exception, DataError)
        assert str(done.exception).startswith("none: no such file or ")
    else:
        assert done.exit_code == 0, done.exception
