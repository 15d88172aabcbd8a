"""The check of the kernels' code on several versions of Triton, without installing one."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import tools.gpu.triton_versions as versions
from megagrow.model.backends import CHECKED_CODE
from tools.gpu.kernel_code import ARCHITECTURES, CompileJob, CompileResult, KernelCode, inspect

ROOT = Path(__file__).resolve().parents[2]
JOB = CompileJob(90, "swiglu", {"rows": 64, "width": 128, "dtype": "bfloat16"})
GOOD = KernelCode("_forward_kernel", "a", 40, 0, 0, 0, 116224, False, {}, False)
SPILLING = replace(GOOD, hash="b", registers=255, stack=8, spills=4)


def test_a_worker_imports_the_version_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise SystemExit(7)")
    [result] = inspect([JOB], processes=1, triton=tmp_path)
    assert result.error == "the compiler aborted its process, exit code 7"


def test_a_version_is_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], check: bool) -> None:
        commands.append(command[1:])
        (tmp_path / "3.7.1" / "triton-3.7.1.dist-info").mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", pip)
    target = tmp_path / "3.7.1"
    assert versions.install("3.7.1", tmp_path) == versions.install("3.7.1", tmp_path) == target
    options = ["--quiet", "--no-deps", "--target", str(target)]
    assert commands == [["-m", "pip", "install", *options, "triton==3.7.1"]]


def test_every_pair_is_a_row_and_problems_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(jobs: Any, processes: int, triton: Path) -> list[CompileResult]:
        spills = triton.name == "3.7.1" and jobs[0].architecture == 90
        return [CompileResult(JOB, (GOOD, SPILLING) if spills else (GOOD, GOOD))]

    monkeypatch.setattr(versions, "inspect", compiled)
    monkeypatch.setattr(versions, "install", lambda version, folder: folder / version)
    path = tmp_path / "table.md"
    with pytest.raises(typer.Exit) as ended:
        versions.main(folder=tmp_path, output=path)
    assert ended.value.exit_code == 1
    lines = path.read_text().splitlines()[2:]
    assert len(lines) == len(CHECKED_CODE) * len(ARCHITECTURES)
    assert "| 3.7.1 | sm_90 | 2 | 1 | 1 | 255 | 50% |" in lines
    assert "| 3.9.0 | sm_90 | 1 | 0 | 0 | 40 | 50% |" in lines
    assert f"Triton 3.7.1: {JOB}: _forward_kernel spills: 4" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as ended:
        versions.main(triton=["3.9.0"], folder=tmp_path, output=path)
    assert ended.value.exit_code == 0


def test_the_tests_run_on_a_checked_version() -> None:
    """The pinned version is that of the CUDA build of torch, which users of GPUs run."""
    [pinned] = re.findall(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert CHECKED_CODE[pinned]
    assert all(set(checked) <= set(ARCHITECTURES) for checked in CHECKED_CODE.values())
