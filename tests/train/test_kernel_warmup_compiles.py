"""The next stage's kernels are compiled beside the training: they are those that it launches then.

No GPU is needed: a step of the model on a simulated one (tests/helpers/kernels/simulated_step.py)
requests its kernels from Triton, and each of them is in the cache that the warm-up filled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megagrow.train.kernel_selection as selection
import megagrow.train.kernel_warmup as module
from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends
from megagrow.model.machine import Machine
from megagrow.train.kernel_calls import NO_CHECKS, KernelCall, stage_kernels
from megagrow.train.kernel_selection import check_host
from megagrow.train.kernel_warmup import WarmUp
from tests.helpers.logs import captured_logs
from tests.helpers.runs import make_run

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 0)
TRITON = Backends(*["triton"] * 5)
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 8192,
}
HYBRID = MODEL | {"model_type": "samba", "sliding_window": 64, "qk_norm": "per_head"}
SEQUENCE = 128
STAGES = [
    {
        "model": model,
        "data": {"train": "corpus", "sequence_length": SEQUENCE},
        "tokens": 1024,
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "parallel": {"zero_stage": zero},
    }
    for zero in (1, 0)
    for model in (MODEL, HYBRID, MODEL | {"model_type": "olmo2"})
]
"""Weights in bf16, and autocast; a hybrid, and norms after the blocks."""
SMALL = (KernelCall("swiglu", (("rows", 16), ("width", 64), ("dtype", "bfloat16"))),)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache of Triton's, for this process's children, which compile."""
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "kernels"))))
        yield folder


@pytest.mark.slow
def test_a_real_step_finds_all_its_kernels_compiled(cache: Path, tmp_path: Path):
    calls = [
        call
        for stage in STAGES
        for call in stage_kernels(StageConfig.model_validate(stage), torch.bfloat16, TRITON)
    ]
    with captured_logs() as said, WarmUp(GPU, 0, NO_CHECKS) as warm_up:
        warm_up.start(tuple(dict.fromkeys(calls)), 90)
        warm_up.wait()
        warm_up.report()
    assert said == []
    compiled = files(cache)
    settings = tmp_path / "settings.json"
    # Another card of the same architecture: it has fewer multiprocessors than is assumed.
    told = {"stages": STAGES, "programs": 108}
    settings.write_text(json.dumps(told), encoding="utf-8")
    command = [sys.executable, "-m", "tests.helpers.kernels.simulated_step", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    assert [name for name, _, cached in launched if not cached] == []
    assert files(cache) == compiled
    # Nor was anything compiled in vain: each kernel's folder in the cache is named by its hash.
    there = {path.parent.name for path in compiled if path.suffix == ".cubin"}
    assert len(there) == len({hash for _, hash, _ in launched}) > 20


def test_compiling_once_more_adds_nothing(cache: Path):
    found = []
    for _ in range(2):
        with WarmUp(GPU, 0, NO_CHECKS) as warm_up:
            warm_up.start(SMALL, 90)
            warm_up.wait()
        found.append(files(cache))
    assert found[0] == found[1]
    assert sum(path.suffix == ".cubin" for path in found[0]) >= 2


def test_each_architecture_has_kernels_of_its_own(cache: Path):
    before = files(cache)
    with WarmUp(GPU, 0, NO_CHECKS) as warm_up:
        warm_up.start(SMALL, 80)
        warm_up.wait()
    new = [path for path in files(cache) - before if path.suffix == ".ptx"]
    assert len(new) == 2
    assert all(".target sm_80" in path.read_text() for path in new)


def test_what_cannot_be_compiled_is_warned_of_and_the_rest_compiled(cache: Path):
    wrong = KernelCall("swiglu", (("rows", 16), ("width", 64), ("dtype", "int8")))
    other = KernelCall("swiglu", (("rows", 16), ("width", 64), ("dtype", "float16")))
    before = files(cache)
    with captured_logs() as said, WarmUp(GPU, 0, NO_CHECKS) as warm_up:
        warm_up.start((wrong, other), 90)
        warm_up.wait()
        warm_up.report()
    [line] = said
    assert line.startswith("the next stage's kernels could not be compiled: swiglu {")
    assert "int8" in line
    assert sum(path.suffix == ".cubin" for path in files(cache) - before) == 2


def test_a_compiler_at_work_is_told_of_and_ended(cache: Path):
    with captured_logs() as said, WarmUp(GPU, 0, NO_CHECKS) as warm_up:
        warm_up.start(SMALL, 90)
        process = warm_up._process
        warm_up.report()
    assert said == ["the next stage's kernels are still being compiled"]
    assert process.poll() == -9


def test_a_process_that_cannot_be_started_is_warned_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.sys, "executable", "/nowhere/python")
    with captured_logs() as said, WarmUp(GPU, 0, NO_CHECKS) as warm_up:
        warm_up.start(SMALL, 90)
        warm_up.report()
    [line] = said
    assert line.startswith("the next stage's kernels are not precompiled: ")


class Started:
    """A run of two stages on a simulated GPU, and what its warm-up would have compiled."""

    def __init__(self, tmp_path: Path, patch: pytest.MonkeyPatch, **kernels: str) -> None:
        stages: list[dict[str, Any]] = [STAGES[0], STAGES[0] | {"kernels": kernels}]
        stages[1]["growth"] = {"operator": "direct_depth"}
        self.run = make_run(tmp_path, stages)
        self.given: list[tuple[tuple[KernelCall, ...], int]] = []
        machine = Machine("cuda", 90, triton=True)
        patch.setattr(selection, "machine_of", lambda device: machine)
        patch.setattr(selection, "check_calls", lambda calls, *_: dict.fromkeys(calls))
        self.checks = check_host(self.run, GPU)
        patch.setattr(WarmUp, "start", lambda _, calls, to: self.given.append((calls, to)))


def test_the_next_stage_is_prepared(tmp_path, monkeypatch):
    started = Started(tmp_path, monkeypatch, attention="triton")
    WarmUp(GPU, 0, started.checks).prepare(started.run, 0)
    [(calls, capability)] = started.given
    assert capability == 90
    assert calls == stage_kernels(started.run.stages[1], torch.bfloat16, TRITON)


@pytest.mark.parametrize(
    ("device", "local_rank", "index"), [("cpu", 0, 0), ("cuda", 1, 0), ("cuda", 0, 1)]
)
def test_nothing_is_compiled_without_need(tmp_path, monkeypatch, device, local_rank, index):
    started = Started(tmp_path, monkeypatch)
    WarmUp(torch.device(device), local_rank, started.checks).prepare(started.run, index)
    assert started.given == []


def test_nothing_is_compiled_where_no_backend_is_triton(tmp_path, monkeypatch):
    backends = {"attention": "sdpa", "norm": "torch", "pointwise": "torch", "loss": "torch"}
    started = Started(tmp_path, monkeypatch, **backends)
    WarmUp(GPU, 0, started.checks).prepare(started.run, 0)
    assert started.given == []
