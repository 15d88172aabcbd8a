"""megagrow doctor: what it says of machines, real and imagined."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.doctor.local import BackendRow, facts, run_rows, usual_rows
from megagrow.errors import InputError
from megagrow.model.machine import Machine
from tests.helpers.jobs import write_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

HOPPER = Machine("cuda", 90, triton=True, checked=True)
CPU = Machine("cpu", triton=True)


def taken(rows: Iterable[BackendRow]) -> dict[str, dict[str, str]]:
    """By operation: the backends that are taken, and when."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.taken:
            found.setdefault(row.operation, {})[row.backend] = row.taken
    return found


def test_what_auto_takes_on_a_gpu_and_on_a_cpu() -> None:
    others = {key: {"triton": "yes"} for key in ("norm", "pointwise", "loss")}
    attention = {"triton": "for packed documents", "sdpa": "without documents"}
    assert taken(usual_rows(HOPPER)) == {"attention": attention} | others
    others = {key: {"torch": "yes"} for key in ("norm", "pointwise", "loss")}
    assert taken(usual_rows(CPU)) == {"attention": {"sdpa": "yes"}} | others


def test_why_the_others_are_not_possible() -> None:
    why = {(row.operation, row.backend): row.why_not for row in usual_rows(CPU)}
    assert "TRITON_INTERPRET=1" in why["norm", "triton"]
    assert "flash-attn is not installed" in why["attention", "flash_attn"]
    assert why["attention", "reference"] == why["loss", "torch"] == ""


def grown_run(folder: Path) -> Path:
    deep = MODEL | {"num_hidden_layers": 4}
    stages = [
        {"tokens": STEP_TOKENS},
        {"tokens": STEP_TOKENS, "model": deep, "growth": {}, "kernels": {"loss": "triton"}},
    ]
    return write_run(folder / "run.yaml", make_run(folder, stages))


def doctor(*words: object) -> str:
    result = CliRunner().invoke(app, ["doctor", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_stages_of_a_run(tmp_path: Path) -> None:
    deep = MODEL | {"num_hidden_layers": 4}
    grown = {"tokens": STEP_TOKENS, "model": deep, "growth": {}}
    kernels = {"attention": "flash_attn", "norm": "triton"}
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}, grown | {"kernels": kernels}])
    cpu = torch.device("cpu")
    assert taken(run_rows(run, 0, cpu)) == {
        "attention": {"sdpa": "yes (auto)"},
        **{key: {"torch": "yes (auto)"} for key in ("norm", "pointwise", "loss")},
    }
    found = taken(run_rows(run, 1, cpu))
    assert found["attention"] == {"flash_attn": "refused: the run would not start"}
    assert found["norm"] == {"triton": "yes (triton)"}, "the tests run in the interpreter"


def test_the_command(tmp_path: Path) -> None:
    said = doctor()
    for fact in (torch.__version__, "none that torch can use", "TRITON_INTERPRET=1", "flash_attn"):
        assert fact in said
    path = grown_run(tmp_path)
    told = doctor("--run", path, "--set", "data.reset_attention_mask=true")
    assert "stage 0 on cpu: float32, head_dim 8, packed documents" in told
    assert "stage 1 on cpu" in told and "yes (triton)" in told
    with pytest.raises(InputError, match="give one with --run"):
        doctor("--set", "seed=1")


def test_facts_say_what_is_there() -> None:
    said = facts()
    assert said["torch"].startswith(torch.__version__)
    assert list(said)[-3:] == ["Triton", "flash-attn", "DeepSpeed"]
    assert said["flash-attn"] == "not installed"
