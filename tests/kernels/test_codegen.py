"""Tests of machine code compiled without a GPU.

Covers all kernels of two shipped models on an H100, and attention of other sizes and architectures.
`tools/gpu/triton_versions.py` inspects every row of every table on several versions of Triton.
"""

from dataclasses import replace

import pytest
import torch

from megagrow.config.load import load_run
from megagrow.model.backends import Backends
from megagrow.train.kernel_calls import stage_kernels
from megagrow_kernels.compiling import SHARED_LIMIT
from tools.gpu.kernel_cases import KERNELS, OPS, cases, override_tiles, unused_rows
from tools.gpu.kernel_code import (
    ARCHITECTURES,
    ROOT,
    CompileJob,
    CompileResult,
    KernelCode,
    _Worker,
    inspect,
    table_jobs,
)

MODELS = ("llama-1.1b", "llama-3b")
"""Together they have heads of 64 and 128, with as many and with fewer key/value heads."""
TRITON = Backends(attention="triton", norm="triton", pointwise="triton", loss="triton")
HEADS = {"batch": 1, "sequence": 2048, "heads": 8, "groups": 2, "dtype": "bfloat16"}


def shipped(model: str) -> list[CompileJob]:
    """Return all kernels of a shipped model on an H100, in bf16."""
    path = ROOT / "configs" / "gstack-1.1b.yaml"
    run = load_run(path, [f"stages.1.model={model}"])
    calls = stage_kernels(run.stages[1], torch.bfloat16, TRITON)
    return [CompileJob(90, call.op, dict(call.arguments)) for call in calls]


ELSEWHERE = [
    CompileJob(
        architecture,
        "attention",
        HEADS | {"head_dim": head_dim, "window": window, "dtype": dtype},
    )
    for architecture, head_dim, window, dtype in (
        (80, 128, None, "bfloat16"),
        (80, 256, 512, "float32"),  # the compiler limits the registers of some tiles to 128
        (90, 256, 512, "bfloat16"),  # these two need almost all registers
        (90, 256, None, "bfloat16"),
        (100, 64, None, "bfloat16"),  # registers of the delta kernel: limited with few warps
        (100, 128, 512, "bfloat16"),
    )
]
ELSEWHERE += [
    CompileJob(
        architecture,
        "attention",
        HEADS | {"head_dim": 128, "window": window, "queries": 512},
    )
    for architecture, window in zip(ARCHITECTURES, (None, 512, None), strict=True)
]
SEQUENCE = {"batch": 4, "sequence": 2048, "channels": 4096}
SEQUENCE |= dict.fromkeys(("dtype", "parameter_dtype"), "bfloat16")
ELSEWHERE += [
    CompileJob(architecture, op, SEQUENCE | sizes)
    for architecture in ARCHITECTURES
    for op, sizes in (("causal_conv", {"taps": 4}), ("selective_scan", {"states": 16}))
]
JOBS = {str(job): job for job in [*(job for m in MODELS for job in shipped(m)), *ELSEWHERE]}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, CompileResult]:
    return dict(zip(JOBS, inspect(JOBS.values()), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_code_is_as_it_should_be(outcomes, name):
    outcome = outcomes[name]
    assert outcome.problems() == []
    assert outcome.codes


def test_attention_multiplies_on_tensor_cores(outcomes):
    """The products of all three kernels are recognized, so the check is not vacuous."""
    for outcome in outcomes.values():
        if outcome.job.op == "attention" and outcome.job.arguments["dtype"] == "bfloat16":
            products = [code.name for code in outcome.codes if code.matrix_products]
            assert len(set(products)) == 3, outcome.job
            used = {name for code in outcome.codes for name, n in code.tensor_cores.items() if n}
            assert (
                used
                & {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA", "HMMA"}}[outcome.job.architecture]
            )


def test_kernels_of_all_tables_go_by_their_names(outcomes):
    actual = {(o.job.op, code.name) for o in outcomes.values() for code in o.codes}
    for op, known in OPS.items():
        compiled = {name for of, name in actual if of == op}
        for table in known.tables:  # a table of several kernels names one of them in each row
            assert compiled & {*KERNELS[table]}, table


def test_bad_tiles_are_found_out():
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "EDGE_N": 64}
    spilling = blocks | {"DESCRIPTORS": 0, "num_warps": 4, "num_stages": 2}
    too_large = blocks | {"DESCRIPTORS": 1, "num_warps": 8, "num_stages": 4}
    jobs = [
        CompileJob(90, "attention", HEADS | {"head_dim": 128}, tiles={"attention_forward": tiles})
        for tiles in (spilling, too_large)
    ]
    jobs.append(CompileJob(90, "attention", HEADS | {"head_dim": 128, "dtype": "int8"}))
    spills, shared, error = (outcome.problems() for outcome in inspect(jobs))
    assert any("_forward_kernel spills" in problem for problem in spills)
    assert any(f"bytes of shared memory, limit {SHARED_LIMIT[90]}" in problem for problem in shared)
    assert len(error) == 1 and str(jobs[-1]) in error[0]


def test_what_is_wrong_with_code():
    good = KernelCode(
        "_forward_kernel", "h", 240, 0, 0, 0, 166912, True, {"HGMMA": 8, "HMMA": 0}, False
    )
    job = CompileJob(90, "attention", {}, tiles={"attention_forward": {"BLOCK_M": 64}})
    assert CompileResult(job, (good,)).problems() == []
    for change, words in (
        ({"spills": 2}, "spills: 2 instructions"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"tensor_cores": {"HGMMA": 0, "HMMA": 8}}, "multiplies matrices without HGMMA"),
        ({"shared": 232449}, "232449 bytes of shared memory, limit 232448"),
    ):
        [problem] = CompileResult(job, (replace(good, **change),)).problems()
        assert problem.startswith(f"{job}: _forward_kernel") and words in problem
    other = replace(good, name="_keys_kernel", spills=9)
    assert CompileResult(job, (good, other)).problems() == []
    assert len(CompileResult(replace(job, tiles={}), (good, other)).problems()) == 1
    asking = replace(job, specialized=True)
    assert "specialized warps" in CompileResult(asking, (good,)).problems()[0]
    assert CompileResult(asking, (replace(good, specialized=True),)).problems() == []


def test_a_compiler_that_ends_its_process_is_named_and_the_next_job_done():
    job = CompileJob(90, "swiglu", {"rows": 64, "width": 128, "dtype": "bfloat16"})
    worker = _Worker()
    try:
        assert worker.do(job).problems() == []
        worker._process.kill()
        [problem] = worker.do(job).problems()
        assert problem == f"{job}: the compiler aborted its process, exit code -9"
        assert worker.do(job).problems() == []
    finally:
        worker.stop()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_of_every_table_is_for_something(architecture):
    assert unused_rows(architecture) == []


def test_the_whole_table_is_inspected_row_by_row():
    jobs = table_jobs(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        listed = [job for job in jobs if job.architecture == architecture]
        assert {job.op for job in listed} == OPS.keys()
        assert len(listed) == sum(len(list(cases(op, architecture))) for op in OPS)
    assert len({str(job) for job in jobs}) == len(jobs)


def test_replaced_tiles_are_put_back():
    from megagrow_kernels.tiles import rows, select

    before = {key: list(value) for key, value in rows("swiglu").items()}
    with override_tiles(90, {"swiglu": {"BLOCK": 1}}):
        assert select("swiglu", 90, bytes=2) == {"BLOCK": 1}
        assert select("swiglu", 80, bytes=2) != {"BLOCK": 1}
    assert rows("swiglu") == before
