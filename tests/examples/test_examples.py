"""The scripts in examples/: each runs as its docstring states, with fewer tokens, and is short."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
LINES = 60
"""An example has fewer."""
TOKENS = 16 * 1024
"""Budget of each stage: 16 steps."""


def execute(script: str, *arguments: str) -> str:
    """Run an example in its own process and return its output."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of train_and_grow.py."""
    folder = tmp_path_factory.mktemp("example")
    return folder, execute("train_and_grow.py", "--output", str(folder), "--tokens", str(TOKENS))


@pytest.mark.slow
def test_train_and_grow(trained: tuple[Path, str]) -> None:
    printed = re.findall(r"(?m)^step +\d+ \| validation loss (\S+)", trained[1])
    losses = [float(text) for text in printed]
    assert len(losses) == 3  # after steps 16, 20 and 32
    assert losses[0] > losses[-1] and losses[-1] < 4.5
    before, after = map(float, re.findall(r"growth \| loss (\S+) -> (\S+)", trained[1])[0])
    assert abs(after - before) < 0.5


@pytest.mark.slow
def test_grow_checkpoint(trained: tuple[Path, str]) -> None:
    out = execute("grow_checkpoint.py", "--example", str(trained[0]))
    losses = {name: float(loss) for name, loss in re.findall(r"(\w+) +\| loss (\S+)", out)}
    assert set(losses) == {"source", "direct_depth", "zero_depth", "net2net_width"}
    for operator in ("zero_depth", "net2net_width"):
        assert losses[operator] == pytest.approx(losses["source"], abs=1e-5)
    assert 1e-4 < abs(losses["direct_depth"] - losses["source"]) < 0.5


@pytest.mark.slow
def test_convert_and_evaluate(trained: tuple[Path, str]) -> None:
    out = execute("convert_and_evaluate.py", "--example", str(trained[0]))
    ((ours, theirs),) = re.findall(r"loss \| megagrow (\S+) \| transformers (\S+)", out)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
    accuracies = re.findall(r"piqa \| acc (\S+)", out)
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[0]) > 0.6


def test_the_api_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, megagrow.api; print({'torch', 'deepspeed', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_states_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < LINES
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"python examples/{path.name}" in docstring
    assert "minute" in docstring


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_uses_the_public_api_only(path: Path) -> None:
    imported = {
        alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in imported if name.startswith("megagrow")} == {"megagrow.api"}
