"""Memory per rank as `plan` predicts it, against the measured memory of training."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.planning.memory import stage_memory
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState
from tests.helpers.runs import MODEL, make_run
from tests.helpers.spawn import run_ranks

MIB = 2**20
LENGTH = 256
STEPS = 2
WIDE = MODEL | {
    "max_position_embeddings": LENGTH,
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "vocab_size": 8192,
}
"""7M parameters, of which the state takes 84 MiB, as much as the activations of 1024 tokens and as
the logits: each part of the estimate is seen."""

_FULL = {"activation_checkpointing": "full"}
_SPLIT = {"zero_stage": 2, "tensor_model_parallel_size": 2}
_CHUNKS = {"linear_cross_entropy": True}
CASES = {
    "1 rank, ZeRO 1": (1, {"zero_stage": 1}, 4, 1, {}),
    "1 rank, ZeRO 3, few tokens": (1, {"zero_stage": 3}, 1, 1, {}),
    "2 ranks, ZeRO 0, checkpointing full": (2, _FULL | {"zero_stage": 0}, 4, 1, {}),
    "2 ranks, ZeRO 1, attention reference": (
        2,
        {"zero_stage": 1},
        4,
        1,
        {"attention": "reference"},
    ),
    "2 ranks, ZeRO 2, two micro batches": (2, {"zero_stage": 2}, 4, 2, {}),
    "2 ranks, ZeRO 2, TP 2, checkpointing full": (2, _FULL | _SPLIT, 4, 1, {}),
    "2 ranks, ZeRO 3": (2, {"zero_stage": 3}, 4, 1, {}),
    "2 ranks, ZeRO 1, head and loss in one": (2, {"zero_stage": 1}, 4, 1, _CHUNKS),
}
"""Ranks, `parallel`, sequences of a micro batch, micro batches of a step, `kernels`."""

BF16 = ("1 rank, ZeRO 1", "2 ranks, ZeRO 2, TP 2, checkpointing full", "2 ranks, ZeRO 3")
"""Cases that are measured in bf16 too, which takes several times as long on CPUs."""


def resident(field: str) -> int:
    """Bytes, by the system's account of this process: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {field}")


def train(run: RunConfig, steps: int) -> None:
    """The first steps of a run, and the end of its engine."""
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    state, feed, stop = RunState(), StepFeed(open_inputs(run).train), StopSignal()
    for _ in range(steps):
        event = advance(run, stage, state, feed, stop)
        assert isinstance(event, StepDone)
        state = event.state
    stage.release()


def peaks_of(runs: list[RunConfig]) -> list[int]:
    """Bytes by which training each run raises the memory of this process at most.

    Each run is trained for a step before: at the first use of a shape the libraries allocate about
    14 MiB that no tensor holds and that later steps reuse.
    """
    # Memory goes back to the system when it is freed, so that what is resident is what is held.
    libc, m_mmap_threshold = ctypes.CDLL(None), -3
    assert libc.mallopt(m_mmap_threshold, 64 * 1024) == 1
    gc.freeze()  # what came with the fork stays shared: a collection would copy it
    peaks = []
    for run in runs:
        train(run, steps=1)
        libc.malloc_trim(0)  # free memory that the fork brought would be used and not be counted
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        train(run, STEPS)
        peaks.append(resident("VmHWM") - before)
    return peaks


def run_of(tmp: Path, case: str, precision: str) -> RunConfig:
    world, parallel, micro, accumulated, kernels = CASES[case]
    dp = world // parallel.get("tensor_model_parallel_size", 1)
    data = {name: [{"path": tmp / name}] for name in ("train", "validation")}
    stage = {
        "model": WIDE,
        "tokens": 10**6,
        "parallel": parallel,
        "batch": {"global_batch_size": micro * accumulated * dp, "micro_batch_size": micro},
        "kernels": kernels,
    }
    return make_run(tmp, [stage], data=data | {"sequence_length": LENGTH}, precision=precision)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_what_is_planned_is_what_is_measured(tmp_path: Path, case: str) -> None:
    precisions = ("fp32", "bf16") if case in BF16 else ("fp32",)
    runs, world = [run_of(tmp_path, case, precision) for precision in precisions], CASES[case][0]
    by_rank = run_ranks(world, peaks_of, runs, fresh=True)
    for precision, run, peaks in zip(precisions, runs, zip(*by_rank, strict=True), strict=True):
        bf16 = precision == "bf16"
        planned = stage_memory(run.stages[0], world, bf16, on_cpu=True).training
        row = [case, precision, *(f"{size / MIB:.0f}" for size in (planned, max(peaks)))]
        print("\n|", *row, f"{planned / max(peaks) - 1:+.1%}", sep=" | ")
        assert planned == pytest.approx(max(peaks), rel=0.05), (case, precision)
