"""megagrow doctor: report of real and simulated machines."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.doctor.local import (
    BackendRow,
    default_rows,
    environment_facts,
    kernel_checks,
    stage_rows,
)
from megagrow.errors import InputError
from megagrow.model.machine import Machine
from megagrow.train.kernel_calls import NO_CHECKS
from tests.helpers.jobs import write_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

HOPPER = Machine("cuda", 90, triton=True)
CPU = Machine("cpu", triton=True)


def selected(rows: Iterable[BackendRow]) -> dict[str, dict[str, str]]:
    """Return by operation the selected backends and when they are selected."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.selected:
            found.setdefault(row.operation, {})[row.backend] = row.selected
    return found


def test_backends_selected_by_auto_on_gpu_and_cpu() -> None:
    others = {key: {"triton": "yes"} for key in ("norm", "pointwise", "loss", "scan")}
    attention = {"triton": "for packed documents", "sdpa": "without documents"}
    assert selected(default_rows(HOPPER)) == {"attention": attention} | others
    others = {key: {"torch": "yes"} for key in ("norm", "pointwise", "loss", "scan")}
    assert selected(default_rows(CPU)) == {"attention": {"sdpa": "yes"}} | others


def test_reasons_for_unavailable_backends() -> None:
    why = {(row.operation, row.backend): row.why_not for row in default_rows(CPU)}
    assert "TRITON_INTERPRET=1" in why["norm", "triton"]
    assert "flash-attn is not installed" in why["attention", "flash_attn"]
    assert "not both installed" in why["scan", "mamba_ssm"]
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


def test_stages_of_a_run(tmp_path: Path) -> None:
    deep = MODEL | {"num_hidden_layers": 4}
    grown = {"tokens": STEP_TOKENS, "model": deep, "growth": {}}
    kernels = {"attention": "flash_attn", "norm": "triton"}
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}, grown | {"kernels": kernels}])
    cpu = torch.device("cpu")
    assert selected(stage_rows(run, 0, cpu, NO_CHECKS)) == {
        "attention": {"sdpa": "yes (auto)"},
        **{key: {"torch": "yes (auto)"} for key in ("norm", "pointwise", "loss", "scan")},
    }
    found = selected(stage_rows(run, 1, cpu, NO_CHECKS))
    assert found["attention"] == {"flash_attn": "not available: the run cannot start"}
    assert found["norm"] == {"triton": "yes (triton)"}, "the tests run in the interpreter"


def test_the_command(tmp_path: Path) -> None:
    output = doctor()
    for fact in (torch.__version__, "none available to torch", "TRITON_INTERPRET=1", "flash_attn"):
        assert fact in output
    path = grown_run(tmp_path)
    output = doctor("--run", path, "--set", "data.reset_attention_mask=true")
    assert "stage 0 on cpu: float32, head_dim 8, packed documents" in output
    assert "stage 1 on cpu" in output and "yes (triton)" in output
    with pytest.raises(InputError, match="give one with --run"):
        doctor("--set", "seed=1")


def test_environment_facts() -> None:
    facts = environment_facts()
    assert facts["torch"].startswith(torch.__version__)
    optional = ["flash-attn", "mamba-ssm", "causal-conv1d"]
    assert list(facts)[-5:] == ["Triton", "DeepSpeed", *optional]
    assert {facts[name] for name in optional} == {"not installed"}


def test_checked_pairs_of_gpu_and_triton() -> None:
    assert kernel_checks(90, "3.7.1").startswith("code checked for sm_90 with Triton 3.7.1 (")
    for capability, triton in ((89, "3.7.1"), (90, "3.8.0"), (90, "not installed")):
        text = kernel_checks(capability, triton)
        assert text.startswith(f"code not checked for sm_{capability} with Triton {triton} (")
        assert "checked versions: 3.6.0, 3.7.1, 3.9.0" in text
