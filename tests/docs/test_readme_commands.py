"""Run every command of README.md, and those of RUN in docs/; parse all other commands.

Small stand-ins with the same names replace slow inputs: a few files instead of Python's standard
library, narrow models, few tokens.
"""

import json
import re
import shlex
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml

from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.cli.app import app
from megagrow.config.load import load_run
from megagrow.config.parallel_rules import world_problems
from megagrow.config.schema import ModelConfig
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError
from megagrow.growth.validation import growth_problems
from megagrow.train.reporting.metrics import read_metrics
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.readme_commands import ROOT, commands, execute, of_megagrow
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_HERE = {
    "make demo": "takes six minutes; test_demo.py checks its run files and its script",
    "git clone": "needs a server",
    "source .venv/bin/activate": "changes the shell",
    "python3.11 -m venv": "creates an environment, as .ci/run does for these tests",
    "pip install torch": "the same",
    "DS_BUILD_OPS=0 pip install": "the same",
    "megagrow train --dry-run --world 64 configs/gstack-7b.yaml": "needs SlimPajama",
    "deepspeed --hostfile": "needs hosts; run/test_launchers.py starts two on this machine",
    "launchers/deepspeed.sh hosts": "needs hosts; run/test_hostfile.py runs the script",
    "sbatch": "needs SLURM",
}
"""Prefixes of README commands that cannot run in a test, each with the reason."""

NARROW = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 2048}
RUN_DIR = Path("runs/my-run")
DOCUMENT_LINES = 40


def prepared(output: str) -> None:
    assert load_tokenizer("data/stdlib/tokenizer.model").vocab_size == 2048
    for part in ("train", "validation"):
        assert Path(f"data/stdlib/{part}.bin").stat().st_size > 1000


def shown(output: str) -> None:
    Path("shown.yaml").write_text(output)
    assert load_run(Path("shown.yaml")) == load_run(Path("RUN.yaml"))


def planned(output: str, title: str = "my-run on 4 ranks") -> None:
    ranks = title.split()[-2]
    assert title in output and "direct_depth" in output
    assert f"ZeRO 1, DP {ranks} x TP 1" in output


def examined(output: str) -> None:
    assert all(name in output for name in ("attention", "norm", "pointwise", "loss", "sdpa"))


def rehearsed(output: str) -> None:
    assert output.count("ZeRO 1, DP rank 0 of 4, TP rank 0 of 1") == 2
    assert "50,312" in output  # a quarter of the 201,248 parameters after the growth


def losses() -> list[float]:
    records = read_metrics(RUN_DIR / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def trained(output: str) -> None:
    """Require the same losses with each launcher, and after a resume."""
    curve, first = losses(), Path("losses.json")
    assert len(curve) == 8 and curve[-1] < curve[0]
    if not first.exists():
        first.write_text(json.dumps(curve))
    assert curve == pytest.approx(json.loads(first.read_text()), rel=1e-4)


def listed(output: str) -> None:
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints()]
    assert steps == [4, 8] and output.count("valid") == 2


def verified(output: str) -> None:
    assert output == "".join(f"{path}: valid\n" for path in checkpoints())


def described(output: str) -> None:
    assert str(checkpoints()[-1]) in output and "num_hidden_layers" in output


def kept(output: str) -> None:
    assert output == "nothing to remove\n" and len(checkpoints()) == 2


def checkpoints() -> list[Path]:
    return list_checkpoints(RUN_DIR / "checkpoints")


def exported(output: str) -> None:
    config = json.loads(Path("exported/config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (8, "bfloat16")
    Path("path/to").mkdir(parents=True)
    shutil.copytree("exported", "path/to/llama")


def imported(output: str) -> None:
    manifest = read_manifest(Path("imported"))
    assert (manifest.model["num_hidden_layers"], manifest.run["counters"]["step"]) == (8, 0)


def resharded(output: str) -> None:
    layout = read_manifest(Path("moved")).layout
    assert (layout["zero_stage"], layout["dp"], layout["tp"]) == (3, 8, 2)


def grown(output: str) -> None:
    manifest = read_manifest(Path("grown/step-000001000"))
    assert manifest.model["num_hidden_layers"] == 4


def reported(output: str) -> None:
    page = Path("runs/report/report.html").read_text()
    assert "my-run" in page and "scratch" in page and '<svg role="img"' in page


RUN: dict[str, Callable[[str], None]] = {
    "megagrow prepare python-stdlib --output data/stdlib --tokenizer train --vocab-size 2048": (
        prepared
    ),
    "megagrow config show RUN.yaml": shown,
    "megagrow plan RUN.yaml --world 4 --gpu h100 --mfu 0.4": planned,
    "megagrow plan RUN.yaml --cluster h100:4x1 --layouts": planned,
    "megagrow doctor --run RUN.yaml": examined,
    "megagrow train --dry-run --world 4 RUN.yaml": rehearsed,
    "megagrow train RUN.yaml": trained,
    "torchrun --nproc-per-node 4 -m megagrow train RUN.yaml": trained,
    "deepspeed --num_gpus 2 --module megagrow train RUN.yaml": trained,
    "megagrow plan configs/gstack-7b.yaml --cluster h100:8x8 --set hardware=8x8xh100-7b": (
        lambda output: planned(output, "gstack-7b on 64 ranks")
    ),
    "megagrow checkpoint ls runs/my-run": listed,
    "megagrow checkpoint verify runs/my-run": verified,
    "megagrow checkpoint show runs/my-run": described,
    "megagrow checkpoint prune runs/my-run --keep-last 3 --dry-run": kept,
    "megagrow convert hf-export runs/my-run exported --dtype bfloat16": exported,
    "megagrow convert hf-import path/to/llama imported": imported,
    "megagrow convert reshard runs/my-run moved --zero-stage 3 --dp 8 --tp 2": resharded,
    "megagrow grow runs/base grown/step-000001000 --to llama-1.1b --operator direct_depth": grown,
    "megagrow report runs/my-run runs/scratch --output runs/report": reported,
}
"""Commands that run, each with the check of its result, which receives the printed output."""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a copy of the repository's configs, with stand-ins, the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    for name, layers in (("demo-2l", 2), ("demo-8l", 8), ("llama-1.1b", 4)):
        model = NARROW | {"num_hidden_layers": layers}
        Path(f"configs/model/{name}.yaml").write_text(yaml.safe_dump(model))
    sources = sorted((Path(sysconfig.get_paths()["stdlib"]) / "email").glob("*.py"))
    lines = "".join(source.read_text() for source in sources).splitlines(keepends=True)
    Path("stdlib").mkdir()
    for start in range(0, len(lines), DOCUMENT_LINES):
        text = "".join(lines[start : start + DOCUMENT_LINES])
        Path(f"stdlib/{start:05}.py").write_text(text)
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    for tokens in ("400K", "800K"):
        assert f"tokens: {tokens}\n" in text
        text = text.replace(f"tokens: {tokens}\n", "tokens: 8K\n")
    Path("RUN.yaml").write_text(text)
    stdlib = {"stdlib": str(tmp_path / "stdlib")}
    paths = SimpleNamespace(get_paths=lambda: stdlib)
    monkeypatch.setattr("megagrow.data.sources.units.sysconfig", paths)
    return tmp_path


def set_up(command: str) -> None:
    """Create or remove the files that a documented command expects or must not find."""
    if command.startswith(("torchrun", "deepspeed")):
        shutil.rmtree(RUN_DIR)  # otherwise the run is already complete
    elif command == "megagrow train RUN.yaml" and RUN_DIR.exists():
        shutil.rmtree(checkpoints()[-1])  # resume from before the growth
    elif command.startswith("megagrow grow"):
        model = ModelConfig(**NARROW, num_hidden_layers=2)
        layout = layout_of(model, 1, 2, 1)
        step = Path("runs/base/checkpoints/step-000000005")
        write_checkpoint(step, model, layout, random_state(layout.plan))
    elif command.startswith("megagrow report"):
        scratch = {"base": "RUN", "name": "scratch", "output_dir": "runs/scratch"}
        optimizer = {"lr": 2e-3}
        scratch["stages"] = [{"model": "demo-8l", "tokens": "12K", "optimizer": optimizer}]
        Path("scratch.yaml").write_text(yaml.safe_dump(scratch))
        execute("megagrow train scratch.yaml", Path.cwd())


def documented() -> list[str]:
    """Return README's commands in order, then those that only other pages print."""
    printed = list(commands(README))
    for page in PAGES[1:]:
        printed += [text for text in commands(page.read_text()) if text not in printed]
    return printed


@pytest.mark.dist
@pytest.mark.slow
def test_the_commands_of_the_table_run(checkout: Path) -> None:
    for command in documented():
        if command in RUN:
            set_up(command)
            print(command)
            RUN[command](execute(command, checkout))


def test_every_command_of_the_table_is_documented() -> None:
    assert sorted(RUN.keys() - set(documented())) == []


def test_each_command_of_the_readme_runs_or_has_a_reason_not_to() -> None:
    printed = list(commands(README))
    reasons = [[start for start in NOT_HERE if text.startswith(start)] for text in printed]
    for command, excuses in zip(printed, reasons, strict=True):
        assert len(excuses) == (command not in RUN), command
    assert {start for excuses in reasons for start in excuses} == NOT_HERE.keys()


PRINTED = sorted({(page.name, text) for page in PAGES for text in commands(page.read_text())})


def test_each_command_line_of_megagrow_can_be_parsed() -> None:
    calls = [(page, words) for page, text in PRINTED for words in of_megagrow(text)]
    assert len(calls) > 25
    for page, words in calls:
        command, rest = typer.main.get_command(app), list(words)
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, f"{page}: megagrow {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        try:
            command.make_context("megagrow", rest)
        except InputError as error:  # arguments are valid, their files are not here
            assert "no such" in str(error)
        except Exception as error:
            pytest.fail(f"{page}: megagrow {' '.join(words)}: {error}")


def test_scripts_and_run_files_of_the_commands_are_there() -> None:
    loops = "\n".join(text for _, text in PRINTED)
    text = re.sub(r"\$\w+", "1", loops)  # their variables are seeds and numbers of ranks
    scripts = set(re.findall(r"\b(?:launchers|tools)/[\w./-]+", text))
    assert len(scripts) > 5 and [name for name in scripts if not (ROOT / name).is_file()] == []
    runs = re.findall(r"(configs/\S+\.yaml)((?: --set (?:'[^']*'|\S+))*)", text)
    assert len(runs) > 5
    for name, overrides in runs:
        load_run(ROOT / name, [word for word in shlex.split(overrides) if word != "--set"])


def test_profiles_of_the_commands_fit_their_ranks() -> None:
    text = "\n".join(text for _, text in PRINTED)
    started = re.findall(r"--nodes (\d+) launchers/slurm.sh (\S+) --set (\S+)", text)
    assert len(started) > 2
    for nodes, name, override in started:
        assert world_problems(load_run(ROOT / name, [override]), 8 * int(nodes)) == [], name


WIDER = ["num_attention_heads=8", "hidden_size=256", "intermediate_size=704"]


def test_the_growths_of_the_readme_are_valid_for_its_run_file(checkout: Path) -> None:
    recipes = re.findall(r"^\| .* \| `(\{.*\})` \|$", README, flags=re.MULTILINE)
    assert len(recipes) > 5
    shutil.copytree(ROOT / "configs/model", "configs/model", dirs_exist_ok=True)
    for recipe in recipes:
        model = "demo-2l" if recipe == "{operator: net2net_width}" else "demo-8l"
        wider = [f"model.{size}" for size in WIDER] if "width" in recipe else []
        changes = [f"growth={recipe}", f"model={model}", *wider]
        run = load_run(Path("RUN.yaml"), [f"stages.1.{change}" for change in changes])
        assert growth_problems(run) == [], recipe
