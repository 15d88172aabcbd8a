"""Benchmarks and tables of tools/gpu/gpu_check.py without a GPU: arithmetic, goals, results.

Its benchmarks run once, with tiny shapes, in Triton's interpreter.
"""

import json

import pytest
import torch

from megagrow_kernels import reference
from tools.gpu.bench.attention import SHAPES, document_ids
from tools.gpu.bench.case import OURS, BenchmarkCase, DeviceSetup, measure
from tools.gpu.bench.goals import GOALS, NOT_MEASURED, BenchmarkResults, goal_rows
from tools.gpu.bench.growth import summary
from tools.gpu.bench.kernels import FAMILIES, records
from tools.gpu.bench.timer import SmokeTimer
from tools.gpu.bench.work import (
    TENSORS,
    KernelWork,
    attention_work,
    linear_cross_entropy_work,
    row_work,
    seen_pairs,
)
from tools.gpu.check_parts import (
    PartResult,
)
from tools.gpu.check_tables import failures, report, table

COPY, MATMUL = 4e12, 800e12
SETUP = DeviceSetup(torch.device("cpu"), smoke=True)


@pytest.mark.parametrize(
    ("lengths", "window"), [((7,), None), ((3, 1, 5), None), ((9,), 4), ((9, 2), 100), ((6,), 1)]
)
def test_pairs_are_those_of_the_mask(lengths, window):
    ids = document_ids(lengths)[None]
    mask = reference.attention_mask(ids)[0, 0]
    if window is not None:
        mask &= ~torch.ones_like(mask).tril(-window)
    assert seen_pairs(lengths, window) == mask.sum()


def test_work():
    assert row_work("rms_norm", 10, 2) == (KernelWork(bytes=40), KernelWork(bytes=60))
    assert sum(TENSORS["cross_entropy"]) * 2 == 6  # bytes per logit in bf16
    forward, backward = attention_work((4096,) * 4, heads=32, head_dim=128)
    assert forward.flops == pytest.approx(4 * 4 * 32 * 4096**2 * 128 / 2, rel=1e-3)
    assert backward.flops == 2.5 * forward.flops
    assert linear_cross_entropy_work(2, 3, 5).flops == 3 * (2 * 2 * 3 * 5)
    assert KernelWork(1, 2) + KernelWork(3, 4) == KernelWork(4, 6)


def test_attention_is_measured_on_as_many_tokens_in_every_shape():
    assert {shape.batch * shape.sequence for shape in SHAPES} == {16384}
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)


def timing(op: str, way: str, by: str, seconds: float, **features: object) -> dict:
    record = {"kind": "timing", "part": "p", "op": op, "case": "c", "way": way, "by": by}
    return record | {"seconds": seconds, "bytes": 0, "flops": 0} | features


def ceiling(copy: float = COPY) -> dict:
    return {"kind": "ceiling", "part": "p", "copy": copy, "matmul": MATMUL}


def goals_of(*actual: dict) -> dict[str, tuple[str, str]]:
    return {text: (value, met) for text, _, value, met in goal_rows(BenchmarkResults(actual))}


def test_nothing_measured_meets_no_goal():
    rows = goal_rows(BenchmarkResults([]))
    assert len(rows) == len(GOALS) == len({row[0] for row in rows})
    assert {row[2:] for row in rows} == {(NOT_MEASURED, "")}


def test_goals_of_a_norm():
    ours = [
        timing("rms_norm", "forward", OURS, s, bytes=4e9, case=c)
        for s, c in ((1.05e-3, "a"), (1.1e-3, "b"))
    ]
    theirs = timing("rms_norm", "forward", "compile", 1.0e-3, bytes=4e9, case="b")
    actual = goals_of(ceiling(), ceiling(3e12), *ours, theirs)
    assert actual["RMSNorm forward, of copy"] == ("0.909", "not met")
    assert actual["RMSNorm forward, speed over torch.compile"] == ("0.909", "not met")
    assert actual["RMSNorm forward, speed over Liger"] == (NOT_MEASURED, "")
    actual = goals_of(ceiling(), ours[0])
    assert actual["RMSNorm forward, of copy"] == ("0.952", "met")


def test_a_case_that_failed_is_the_worst_one():
    failed = timing("rms_norm", "forward", OURS, 0.0) | {"problem": "it broke"}
    del failed["seconds"]
    actual = BenchmarkResults(
        [ceiling(), timing("rms_norm", "forward", OURS, 1e-3, bytes=4e9), failed]
    )
    assert actual.copy_fraction(op="rms_norm", way="forward") is None
    assert failures(actual) == [failed]
    assert failures(BenchmarkResults([failed | {"by": "liger"}])) == []


def test_goals_of_attention():
    def one(by: str, seconds: float, sequence: int, shape: str = "dense") -> dict:
        features = {"shape": shape, "head_dim": 128, "sequence": sequence, "flops": 1e12}
        return timing("attention", "forward", by, seconds, case=f"{shape} {sequence}", **features)

    short = [one(OURS, 3e-3, 2048), one("cudnn", 1e-3, 2048)]
    long = [one(OURS, 2e-3, 4096), one("cudnn", 1.8e-3, 4096), one("flash", 2.5e-3, 4096)]
    packed = [one(OURS, 3e-3, 8192, "packed"), one(OURS, 3.3e-3, 8192, "skewed")]
    actual = goals_of(ceiling(), *short, *long, *packed)
    assert actual["attention d128 from 4k forward, speed over SDPA cudnn"] == ("0.900", "met")
    assert actual["attention d128 from 4k forward, speed over SDPA flash"] == ("1.250", "not met")
    assert actual["packed documents forward, of our dense FLOP/s"] == ("0.909", "not met")


def test_goals_of_the_loss_and_of_training():
    alone = timing("cross_entropy", "both", OURS, 1.2e-3, bytes=4e9)
    head = [
        timing("linear_cross_entropy", "both", by, s) for by, s in ((OURS, 2.0), ("plain", 2.1))
    ]
    memory = {"kind": "memory", "part": "p", "op": "x", "case": "c", "by": OURS}
    memory |= {"extra_bytes": 100, "logits_bytes": 1000}
    steps = [{"kind": "training", "model": "llama-1.1b", "mfu": mfu} for mfu in (0.4, None, 0.52)]
    actual = goals_of(ceiling(), alone, *head, memory, *steps)
    assert actual["vocab-parallel cross-entropy, over its byte floor"] == ("1.200", "met")
    assert actual["linear + cross-entropy, speed over plain"] == ("1.050", "met")
    assert actual["linear + cross-entropy, memory over the logits'"] == ("0.100", "met")
    assert actual["1.1B training, MFU"] == ("0.520", "met")


def test_tables():
    lines = table(("a", "long heading"), [("wide cell", "x"), ("y", "z")])
    assert lines[1:] == ["a          long heading", "-" * 23, "wide cell  x", "y          z"]
    assert table(("a",), []) == []
    cudnn = timing("attention", "forward", "cudnn", 2e-3, flops=1e12)
    ours = timing("attention", "forward", OURS, 2.5e-3, flops=1e12)
    problem = timing("attention", "forward", "flex", 0.0) | {"problem": "no backward on a CPU"}
    del problem["seconds"]
    missing = {"kind": "missing", "part": "p", "library": "liger"}
    outcomes = [PartResult("p", 3.2, "done"), PartResult("q", 60.0, "cut after 60 s")]
    text = "\n".join(report(outcomes, BenchmarkResults([ceiling(), ours, cudnn, problem, missing])))
    assert "matmul 800 TFLOP/s, copy 4.00 TB/s" in text
    assert "2500.0   400 TFLOP/s  50%         cudnn 0.80" in text
    assert "cut after 60 s" in text
    assert "attention forward c flex: no backward on a CPU" in text
    assert "not compared: liger" in text


def test_the_stall_of_a_growth():
    def step(stage: int, seconds: float, lost: float) -> dict:
        return {"kind": "train", "stage": stage, "seconds": seconds, "lost_seconds": lost}

    growth = {"kind": "growth", "seconds": 2.0, "lost_seconds": 8.0, "peak_memory_bytes": 1}
    growth |= {"bytes_within_ranks": 5, "loss_before": 1.0, "loss_after": 2.0}
    steps = [step(0, 9.0, 0.0), step(0, 1.0, 0.0), step(0, 1.0, 5.0)]
    after = [step(1, 4.5, 8.0), step(1, 1.5, 8.0), step(1, 1.5, 8.0)]
    actual = summary([*steps, growth, *after])
    assert (actual["event_seconds"], actual["stall_seconds"]) == (3.0, 6.0)
    assert (actual["base_step_seconds"], actual["step_seconds"]) == (1.0, 1.5)


def test_what_another_cannot_do_is_a_finding():
    def cannot() -> torch.Tensor:
        raise NotImplementedError("not on this card\nand more")

    x = torch.ones(3, requires_grad=True)
    case = BenchmarkCase(
        "op", "case", {OURS: lambda: 2 * x, "other": cannot}, (x,), KernelWork(bytes=24)
    )
    actual = list(measure(case, SmokeTimer()))
    assert [(r["way"], r["by"], r.get("problem")) for r in actual] == [
        ("forward", OURS, None),
        ("forward", "other", "NotImplementedError: not on this card"),
        ("backward", OURS, None),
        ("backward", "other", "NotImplementedError: not on this card"),
    ]
    assert actual[0]["bytes"] == 24 and actual[0]["seconds"] >= 0


ON_A_CPU = {("flex", "backward")}
"""(implementation, direction) pairs that do not exist on a CPU."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_benchmark_runs(family: str):
    actual = [json.loads(json.dumps(record)) for record in records(family, SETUP)]
    wrong = [r for r in actual if "problem" in r and (r["by"], r["way"]) not in ON_A_CPU]
    assert not wrong
    timings = [r for r in actual if r["kind"] == "timing"]
    assert {r["op"] for r in timings if r["by"] == OURS} == {
        "rows": {"rms_norm", "add_rms_norm", "rope", "swiglu"},
        "attention": {"attention"},
        "scan": {"causal_conv", "selective_scan"},
        "loss": {"cross_entropy", "linear_cross_entropy"},
    }[family]
    directions = {r["way"] for r in timings}
    assert directions == ({"both"} if family == "loss" else {"forward", "backward"})
    results = BenchmarkResults([{"part": "p"} | r for r in actual])
    assert report([PartResult("p", 1.0, "done")], results)
