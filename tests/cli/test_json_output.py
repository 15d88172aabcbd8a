"""`--json`: one document alone on standard output, with the numbers of the tables."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.cli.app import app
from megagrow.common.sizes import format_bytes, format_duration
from megagrow.config import deprecated
from megagrow.planning.cluster_tables import PARTS
from megagrow.planning.tables import MEMORY_LABELS
from tests.helpers.checkpoint.damage import flip, truncate
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "reference" / "machine-readable.md"
PLAN = ("plan", str(CONFIGS / "gstack-1.1b.yaml"), "--cluster", "h100:4x1", "--price", "2")


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def document(*words: object, code: int = 0) -> Any:
    return json.loads(run(*words, "--json", code=code))


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of all tables by row label; a label in two tables has the last one's."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if "|" in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Run directory with a valid checkpoint, a damaged one and an unfinished one."""
    layout = layout_of(MODEL, 1, 2, 1)
    for step in (9, 10):
        path = tmp_path / "checkpoints" / checkpoint_name(step)
        write_checkpoint(path, MODEL, layout, random_state(layout.plan))
    truncate(path)
    (tmp_path / "checkpoints" / f"{checkpoint_name(12)}.tmp").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def plan() -> Any:
    return document(*PLAN, "--layouts")


@pytest.fixture(scope="module")
def plan_text() -> str:
    return run(*PLAN)


def test_plan_has_the_numbers_of_the_answer_and_the_stages(plan: Any, plan_text: str) -> None:
    table, stages, peak = rows(plan_text), plan["stages"], plan["peak"]
    gib = f"{peak['bytes'] / 2**30:.1f} of {plan['capacity_bytes'] / 2**30:.1f} GiB"
    assert plan["fits"] is True
    assert f"fits: {gib} (stage {peak['stage']}, rank {peak['rank']})" in plan_text
    assert f"time: {format_duration(plan['cost']['seconds'])} (" in plan_text
    for label, key in {"parameters": "parameters", "steps": "steps"}.items():
        assert table[label] == [f"{stage[key]:,}" for stage in stages]
    for key, label in MEMORY_LABELS.items():
        shown = [f"{stage['memory_bytes'][key] / 2**30:.3f}" for stage in stages]
        assert table.get(label, ["0.000"] * 2) == shown
    assert plan["flops"] == sum(stage["flops"] for stage in stages)


def test_plan_has_the_numbers_of_growths_costs_and_predictions(plan: Any, plan_text: str) -> None:
    table, (base, target) = rows(plan_text), plan["stages"]
    growth = target["growth"]
    assert base["growth"] is None and growth["operators"] == [["direct_depth"]]
    assert table["growth factor g"] == [f"{growth['factor']:.2f}"]
    assert table["peak memory per rank, GiB"] == [f"{growth['peak_bytes'] / 2**30:.3f}"]
    costs = [base["cost"], target["cost"], plan["cost"], *plan["scratch_cost"]]
    assert table["price"] == [f"{cost['price']:,.2f}" for cost in costs]
    assert table["GPU-hours"] == [f"{cost['gpu_hours']:,.1f}" for cost in costs]
    predictions = [stage["prediction"] for stage in plan["stages"]]
    assert table["step, s"] == [f"{each['step_seconds']:.3f}" for each in predictions]
    for each in predictions:
        parts = sum(each["parts_seconds"][part] for part in PARTS.values())
        assert parts == pytest.approx(each["step_seconds"])


def test_layouts_are_sorted_by_speed_and_fit(plan: Any) -> None:
    for stage in plan["stages"]:
        seconds = [layout["step_seconds"] for layout in stage["layouts"]]
        assert len(seconds) > 3 and seconds == sorted(seconds)
        assert all(each["memory_bytes"] < plan["capacity_bytes"] for each in stage["layouts"])


def test_unknown_values_of_a_plan_are_null() -> None:
    found = document("plan", CONFIGS / "demo" / "gstack.yaml")
    unknown = ("fits", "capacity_bytes", "pace", "cost_factors", "cost")
    assert {key: found[key] for key in unknown} == dict.fromkeys(unknown)
    assert found["peak"]["rank"] is None, "the growth needs most"
    assert found["stages"][0]["prediction"] is None and found["stages"][0]["layouts"] == []


def test_warnings_about_a_run_file_do_not_reach_the_document() -> None:
    deprecated._warn.cache_clear()
    old_key = f"stages.1.growth.layers={[*range(6)] * 4}"
    result = CliRunner().invoke(app, [*PLAN[:2], "--set", old_key, "--json"])
    assert json.loads(result.stdout)["name"] == "gstack-1.1b"
    assert "growth.layer_map" in result.stderr


def test_checkpoint_ls(checkpoints: Path) -> None:
    valid, damaged, unfinished = document("checkpoint", "ls", checkpoints)["checkpoints"]
    table = rows(run("checkpoint", "ls", checkpoints))
    assert (valid["state"], valid["problem"], valid["protected"]) == ("valid", None, None)
    assert valid["layout"] == {"zero_stage": 1, "dp": 2, "tp": 1}
    shown = [str(valid["stage"]), f"{valid['tokens']:,}", format_bytes(valid["bytes"])]
    assert table["9"][:3] == shown
    assert damaged["state"] == "damaged" and "truncated" in damaged["problem"]
    assert (unfinished["step"], unfinished["state"]) == (12, "unfinished")
    assert valid.keys() == damaged.keys() == unfinished.keys()


def test_checkpoint_show(checkpoints: Path) -> None:
    path = checkpoints / "checkpoints" / checkpoint_name(9)
    found, text = document("checkpoint", "show", path), run("checkpoint", "show", path)
    assert (found["path"], found["protected"]) == (str(path), None)
    assert re.search(rf"hidden_size +{found['model']['hidden_size']}\b", text)
    assert re.search(rf"adam_step +{found['adam_step']}\b", text)
    assert re.search(rf"tokens +{found['counters']['tokens']}\b", text)
    for name, record in found["files"].items():
        assert (path / name).stat().st_size == record["bytes"]
        assert f"{record['bytes']} bytes, {record['xxh3_64']}" in text


def test_checkpoint_verify_keeps_its_exit_code(checkpoints: Path) -> None:
    path = checkpoints / "checkpoints" / checkpoint_name(9)
    entry = {"path": str(path), "problems": []}
    assert document("checkpoint", "verify", path) == {"valid": True, "checkpoints": [entry]}
    flip(path)
    found = document("checkpoint", "verify", path, code=1)
    assert found["valid"] is False
    (problem,) = found["checkpoints"][0]["problems"]
    assert run("checkpoint", "verify", path, code=1) == f"{problem}\n"


def test_doctor() -> None:
    found, text = document("doctor"), run("doctor")
    assert found["device"] == "cpu" and found["environment"]["torch"] in text
    assert {"python", "gpus", "triton", "flash_attn", "deepspeed"} <= found["environment"].keys()
    available = {row["backend"]: row for row in found["backends"] if row["operation"] == "norm"}
    assert available["torch"]["available"] and available["torch"]["reason"] is None
    shown = [line for line in text.splitlines() if line.startswith("|") and "| no: " in line]
    reasons = [row["reason"] for row in found["backends"] if not row["available"]]
    assert [any(reason in line for line in shown) for reason in reasons] == [True] * len(shown)
    staged = document("doctor", "--run", CONFIGS / "demo" / "gstack.yaml")
    assert {row["stage"] for row in staged["backends"]} == {0, 1}


def test_an_error_prints_no_document() -> None:
    words = [sys.executable, "-m", "megagrow", "plan", "missing.yaml", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: missing.yaml")


OPEN = {"model", "counters", "versions", "files", "environment", "position"}
"""Keys whose values are documented on another page, or without their own keys."""


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from keys(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key not in OPEN:
                yield from keys(item)


def test_every_key_is_documented(plan: Any, checkpoints: Path) -> None:
    path = checkpoints / "checkpoints" / checkpoint_name(9)
    documents = {
        "megagrow plan": plan,
        "megagrow checkpoint ls": document("checkpoint", "ls", checkpoints),
        "megagrow checkpoint show": document("checkpoint", "show", path),
        "megagrow checkpoint verify": document("checkpoint", "verify", path),
        "megagrow doctor": document("doctor"),
    }
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = {section.partition("\n")[0]: section for section in sections}
    for command, found in documents.items():
        named = set(re.findall(r"`(\w+)`", texts[f"`{command} --json`"]))
        assert set(keys(found)) - named == set(), command
