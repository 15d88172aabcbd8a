"""Self-check at the start of a run: its processes, its cache, and the agreement of the ranks."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.errors import ResourceError
from megagrow.model.machine import Machine
from megagrow.model.ops import PLAIN
from megagrow.parallel.launch import Launch
from megagrow.train import kernel_check, kernel_selection
from megagrow.train.kernel_calls import NO_CHECKS, Checks, KernelCall
from megagrow.train.kernel_check import check_calls
from megagrow.train.kernel_selection import (
    agreed_checks,
    check_host,
    check_kernels,
    select_backends,
    stage_ops,
)
from tests.helpers.logs import captured_logs
from tests.helpers.runs import STEP_TOKENS, make_run
from tests.helpers.spawn import run_ranks

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FACTS = {"gpu": "NVIDIA Test", "driver": "1"}
WIDTHS = (64, 96, 128)
CALLS = [KernelCall("swiglu", (("rows", 8), ("width", w), ("dtype", "float32"))) for w in WIDTHS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a machine that is always the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_check, "environment", lambda device: FACTS)
    return tmp_path / "cache" / "megagrow" / "kernel-checks"


def test_real_kernels_pass_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real process, in the interpreter; later checks read its results."""
    with captured_logs() as log:
        assert check_calls(CALLS, CPU, 0) == dict.fromkeys(CALLS)
    assert "3 of 3 calls passed | 0 cached" in log[0]
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(kernel_check, "COMMAND", ("/nowhere/python",))
    with captured_logs() as log:
        assert check_calls(CALLS, CPU, 0) == dict.fromkeys(CALLS)
    assert "3 of 3 calls passed | 3 cached" in log[0]
    monkeypatch.setattr(kernel_check, "environment", lambda device: FACTS | {"driver": "2"})
    reasons = check_calls(CALLS, CPU, 0)
    assert all(reason and "No such file" in reason for reason in reasons.values())
    assert len(list(cache.iterdir())) == 3, "a failed start says nothing about the kernels"


GOOD = {"tensor": "output", "error": 0.001, "tolerance": 0.06}
SCRIPT = """
import json, os, sys, time
calls = [arguments["width"] for op, arguments in json.load(sys.stdin)]
def say(value): print(json.dumps(value), flush=True)
say({"device": "cuda:0"})
print("a library prints this")
for width in calls:
    if width == 96:
        BREAK
    say(GOOD)
"""
LOST = 'say({"problem": "RuntimeError: illegal memory access"}); sys.exit(3)'
ENDINGS = {
    "crash": ("sys.stderr.write('assertion failed'); sys.stderr.flush(); os.abort()", "code -6"),
    "device lost": (LOST, "could not finish: RuntimeError: illegal memory access"),
    "wrong": ('say(GOOD | {"error": 0.5}); continue', "output differs from the reference by 0.5"),
    "not finite": ('say(GOOD | {"error": None}); continue', "output is not finite"),
}


def script(ending: str) -> tuple[str, ...]:
    return sys.executable, "-c", SCRIPT.replace("BREAK", ending).replace("GOOD", repr(GOOD))


@pytest.mark.parametrize("name", ENDINGS)
def test_a_kernel_that_fails_fails_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ending, text = ENDINGS[name]
    monkeypatch.setattr(kernel_check, "COMMAND", script(ending))
    reasons = check_calls(CALLS, GPU, 90)
    assert [reason is None for reason in reasons.values()] == [True, False, True]
    reason = reasons[CALLS[1]] or ""
    assert "swiglu(rows=8, width=96, dtype=float32)" in reason and text in reason
    assert len(list(cache.iterdir())) == (3 if name in ("wrong", "not finite") else 2)
    if name == "crash":
        assert "(assertion failed)" in reason
    if name == "wrong":
        assert "relative error; tolerance 0.06" in reason
        monkeypatch.setattr(kernel_check, "COMMAND", ())  # nothing is run again
        assert check_calls(CALLS, GPU, 90) == reasons


def test_a_kernel_that_hangs_ends_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "COMMAND", script("time.sleep(60)"))
    monkeypatch.setattr(kernel_check, "SECONDS", 1.5)
    first, *others = check_calls(CALLS, GPU, 90).values()
    assert first is None
    assert all(reason and "not finished within 2 s" in reason for reason in others)


def test_damaged_cache_entries_are_ignored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "COMMAND", script("pass"))
    assert check_calls(CALLS, GPU, 90) == dict.fromkeys(CALLS)
    for path, text in zip(sorted(cache.iterdir()), ("{", "[]", '{"result": {}}'), strict=True):
        path.write_text(text)
    assert check_calls(CALLS, GPU, 90) == dict.fromkeys(CALLS)
    assert all(json.loads(path.read_text())["result"] == GOOD for path in cache.iterdir())


def test_the_digest_covers_the_kernels() -> None:
    assert len(kernel_check.source_digest()) == 32


# --- agreement ---


@pytest.fixture
def gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    """A run on a simulated H100; the loss names Triton, the others are `auto`."""
    machine = {"cuda": Machine("cuda", 90, triton=True), "cpu": Machine("cpu", triton=True)}
    monkeypatch.setattr(kernel_selection, "machine_of", lambda device: machine[device.type])
    stage = {"tokens": STEP_TOKENS, "kernels": {"loss": "triton"}}
    yield make_run(tmp_path, [stage], precision="bf16")


def results(run: RunConfig, *failed: str) -> Checks:
    """The results of a host on which some ops fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_selection, "check_calls", _failing(*failed))
        return check_host(run, GPU)


def _failing(*ops: str) -> Any:
    return lambda calls, *_: {
        call: f"{call.op} is wrong" if call.op in ops else None for call in calls
    }


def test_failed_operations_fall_back(gpu_run: RunConfig) -> None:
    def backends(*failed: str) -> tuple[str, ...]:
        return select_backends(
            gpu_run, 0, GPU, results(gpu_run, *failed)
        ).backends.__dict__.values()

    assert [*backends()] == ["sdpa", "triton", "triton", "triton", "torch"]
    assert [*backends("rope")] == ["sdpa", "triton", "torch", "triton", "torch"]
    assert [*backends("add_rms_norm", "swiglu")] == ["sdpa", "torch", "torch", "triton", "torch"]
    unchecked = select_backends(gpu_run, 0, GPU, NO_CHECKS).backends
    assert (unchecked.norm, unchecked.loss) == ("torch", "triton"), "auto needs a check"
    checked = {call.op for call in results(gpu_run)}
    assert checked == {"rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy"}


def test_a_call_passes_if_it_passes_on_all_hosts() -> None:
    a, b, c = CALLS
    agreed = agreed_checks([{a: None, b: None, c: "x"}, {a: None, b: "y"}])
    assert agreed == {a: None, b: "y", c: "x"}
    assert agreed_checks([{a: None}, {}]) == {a: f"a host cannot run {a}"}


def _check_as(run: RunConfig, hosts: int) -> list[Any]:
    """Check as ranks of one or two hosts, of which only the first finds a wrong norm."""
    rank = torch.distributed.get_rank()
    local_rank = rank if hosts == 1 else 0
    checked: list[int] = []

    def check_calls(calls: Any, *_: Any) -> Checks:
        checked.append(rank)
        return _failing(*(["rms_norm"] if rank == 0 else []))(calls)

    machine = Machine("cuda", 90, triton=True)
    with pytest.MonkeyPatch.context() as patch, captured_logs() as log:
        patch.setattr(kernel_selection, "machine_of", lambda device: machine)
        patch.setattr(kernel_selection, "check_calls", check_calls)
        checks = check_kernels(run, GPU, Launch(rank, 2, local_rank))
        norm = stage_ops(run, 0, GPU, checks).add_rms_norm is None
        named = run.stages[0].kernels.model_copy(update={"norm": "triton"})
        stage = run.stages[0].model_copy(update={"kernels": named})
        try:
            check_kernels(
                run.model_copy(update={"stages": [stage]}), GPU, Launch(rank, 2, local_rank)
            )
        except ResourceError as error:
            return [len(checked), sorted(map(str, checks.items())), norm, log, str(error)]
    return []


@pytest.mark.dist
def test_all_ranks_agree(gpu_run: RunConfig) -> None:
    for hosts in (1, 2):
        first, second = run_ranks(2, _check_as, gpu_run, hosts)
        assert (first[0], second[0]) == ((2, 0) if hosts == 1 else (2, 2))
        assert first[1] == second[1] and first[2] is second[2] is True
        [warning] = [line for line in first[3] if "auto selects" in line]
        assert warning.startswith(
            "stages.0.kernels.norm = auto selects torch: rms_norm is wrong on "
        )
        assert not [line for line in second[3] if "auto selects" in line]
        assert first[4] == second[4]
        assert first[4].startswith("stages.0.kernels.norm = triton: rms_norm is wrong on ")


@pytest.mark.dist
def test_a_cpu_run_checks_nothing(tmp_path: Path) -> None:
    stage = {"tokens": STEP_TOKENS, "kernels": {"norm": "triton"}}
    assert run_ranks(1, _check_on_cpu, make_run(tmp_path, [stage])) == [True]


def _check_on_cpu(run: RunConfig) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_selection, "check_calls", None)
        checks = check_kernels(run, CPU, Launch(0, 1, 0))
        return checks == NO_CHECKS and stage_ops(run, 0, CPU, checks) != PLAIN
