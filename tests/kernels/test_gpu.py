"""GPU tests of kernels: accuracy, determinism, compilation, and a run under ZeRO-3.

The checks run in separate processes, which see the GPU. On the CPU, the checks themselves are
tested with small shapes in Triton's interpreter.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from megagrow.train.reporting.metrics import read_metrics
from tests.helpers.jobs import write_run
from tests.helpers.kernels.gpu_checks import CHECKS, KernelDevice
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

ROOT = Path(__file__).resolve().parents[2]
TRITON = dict.fromkeys(("attention", "norm", "pointwise", "loss"), "triton")
TORCH = {"attention": "sdpa", "norm": "torch", "pointwise": "torch", "loss": "torch"}


def start(arguments: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str, gpu_environment: dict[str, str]) -> None:
    path = f"{ROOT}:{ROOT / 'kernels'}:{':'.join(sys.path)}"
    start(["-m", "tests.helpers.kernels.gpu_checks", name], gpu_environment | {"PYTHONPATH": path})


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_themselves(name: str) -> None:
    CHECKS[name](KernelDevice("cpu", {"attention": 32, "beyond-32-bits": 2**16}.get(name, 256)))


@pytest.mark.gpu
def test_a_run_under_zero_3(tmp_path: Path, gpu_environment: dict[str, str]) -> None:
    """bf16, packed documents, a growth: the losses equal those of torch's own operations."""
    actual = {}
    for name, kernels in (("triton", TRITON), ("torch", TORCH)):
        stage = {"tokens": 8 * STEP_TOKENS, "parallel": {"zero_stage": 3}, "kernels": kernels}
        deep = MODEL | {"num_hidden_layers": 4}
        grown = stage | {"model": deep, "growth": {"operator": "direct_depth"}}
        data = {"train": tmp_path / "train", "sequence_length": 16, "reset_attention_mask": True}
        options = {"precision": "bf16", "output_dir": tmp_path / name}
        run = make_run(tmp_path, [stage, grown], data=data, **options)
        path = write_run(tmp_path / f"{name}.yaml", run)
        start(["-m", "megagrow", "train", str(path)], gpu_environment)
        records = read_metrics(run.output_dir / "metrics.jsonl")
        actual[name] = [record["loss"] for record in records if record["kind"] == "train"]
    assert actual["triton"] == pytest.approx(actual["torch"], rel=2e-2)
    assert actual["triton"][-1] < actual["triton"][0]
