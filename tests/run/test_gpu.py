"""A grown run on one GPU, under every ZeRO stage: in fp32 it has the losses of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagrow.config.schema import RunConfig
from megagrow.train.reporting.metrics import read_metrics
from tests.helpers.jobs import write_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run


def grown_run(folder: Path, name: str, zero_stage: int, precision: str) -> RunConfig:
    parallel = {"zero_stage": zero_stage}
    deep = MODEL | {"num_hidden_layers": 4}
    growth = {"operator": "direct_depth"}
    return make_run(
        folder,
        [
            {"tokens": 8 * STEP_TOKENS, "parallel": parallel},
            {"model": deep, "tokens": 8 * STEP_TOKENS, "parallel": parallel, "growth": growth},
        ],
        precision=precision,
        output_dir=folder / name,
    )


def losses(run: RunConfig, environment: dict[str, str]) -> list[float]:
    path = write_run(run.output_dir.with_suffix(".yaml"), run)
    command = [sys.executable, "-m", "megagrow", "train", str(path)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    records = read_metrics(run.output_dir / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.gpu
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_grown_run_on_the_gpu(tmp_path: Path, gpu_environment, zero_stage: int) -> None:
    on_cpu = losses(grown_run(tmp_path, "cpu", zero_stage, "fp32"), dict(os.environ))
    in_fp32 = losses(grown_run(tmp_path, "fp32", zero_stage, "fp32"), gpu_environment)
    in_bf16 = losses(grown_run(tmp_path, "bf16", zero_stage, "bf16"), gpu_environment)
    assert in_fp32 == pytest.approx(on_cpu, rel=1e-3)
    assert in_bf16 == pytest.approx(on_cpu, rel=3e-2)
    assert in_bf16[-1] < in_bf16[0]
