"""README.md: its size, run file, overrides, commands and file names."""

import re
from pathlib import Path

import typer

from megagrow.cli.app import app
from megagrow.config.load import load_run
from tools.docs.code_map import FOLDERS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_BYTES = 16_000


def test_the_readme_is_short() -> None:
    assert len(README.encode()) < MAX_BYTES


def test_every_folder_of_the_repository_has_a_line() -> None:
    lines = re.findall(r"^\| `([a-z]+)/` \| .{10,} \|$", README, flags=re.MULTILINE)
    assert set(lines) == {*FOLDERS, "docs"}
    assert all((ROOT / name).is_dir() for name in lines)


def test_the_run_file_of_the_readme_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(example, encoding="utf-8")
    run = load_run(path)
    assert [stage.model.num_hidden_layers for stage in run.stages] == [2, 8]
    assert [stage.tokens for stage in run.stages] == [400_000, 800_000]


def test_the_overrides_of_the_readme_work() -> None:
    overrides = set(re.findall(r"`--set ([\w.]+=[\w.-]+)`", README)) - {"path.to.key=value"}
    assert len(overrides) == 5
    for override in overrides:
        name = "scratch-1.1b" if override.startswith("model=") else "gstack-1.1b"
        load_run(ROOT / "configs" / f"{name}.yaml", [override])


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^)make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "setup"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_commands_of_the_readme_exist() -> None:
    known = typer.main.get_command(app).commands
    code = "".join(re.findall(r"```bash\n.*?```|`[^`\n]+`", README, flags=re.DOTALL))
    used = set(re.findall(r"\bmegagrow ([a-z]+(?:-[a-z]+)*)", code))
    assert {"prepare", "train", "plan", "report", "doctor"} < used == known.keys()


def test_files_that_the_readme_names_are_there() -> None:
    named = re.findall(r"`((?:configs|megagrow|tools|launchers)/[\w./-]+)`", README)
    assert len(named) > 2
    # NAME.yaml is a placeholder.
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []
