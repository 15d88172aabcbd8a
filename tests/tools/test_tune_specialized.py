"""Tests of the warp-specialized attention forward as a contender in the tuner and the benchmark."""

import json

import torch

import tools.gpu.tune_kernels as tuner
from megagrow_kernels.tiles import override, row, rows_for
from tools.gpu.bench import attention as bench_attention
from tools.gpu.bench.case import OURS, DeviceSetup
from tools.gpu.kernel_candidates import candidates, choose, is_specialized
from tools.gpu.kernel_cases import KERNELS, cases


def test_warp_specialized_attention_contends_where_it_fits():
    contenders = {
        (architecture, case.features["head_dim"])
        for architecture in (80, 90, 100)
        for case in tuner.training_cases("attention", architecture)
        for tiles in candidates("attention_forward", case.features, architecture)
        if is_specialized(tiles)
    }
    assert contenders == {(90, 64), (90, 128)}
    assert "_kernel" in KERNELS["attention_forward"], "its code is not judged"


def test_warp_specialized_attention_wins_only_calls_that_it_supports(monkeypatch):
    special = {"GENERATION": 2, "STAGES": 2}
    others = candidates("attention_forward", {"head_dim": 128, "bytes": 2}, 90)[:3]
    seconds = {str(special): 1.0, str(others[0]): 3.0, str(others[1]): 2.0, str(others[2]): 4.0}
    compared = []

    def fastest(case, table, tiles, timer, device):
        compared.append(len(tiles))
        return choose([(each, seconds[str(each)]) for each in tiles])

    monkeypatch.setattr(tuner, "fastest", fastest)
    monkeypatch.setattr(tuner, "architecture", lambda device: 90)
    found = []
    for case in tuner.training_cases("attention", 90):
        if case.features["head_dim"] in (64, 128):
            arguments = (case, "attention_forward", [*others, special], None)
            found += tuner.fastest_rows(*arguments, torch.device("cpu"), "a GPU")
    assert compared == [4, 3, 4, 3] and len(found) == 4
    merged = json.loads(tuner.merged_table("attention_forward", 90, found))["90"]
    with override(90, {"attention_forward": merged}):
        for head_dim, fits in ((32, False), (64, True), (80, False), (128, True)):
            taken = row("attention_forward", 90, head_dim=head_dim, bytes=2, hopper=fits)
            assert taken["use"] == (special if fits else others[1]), head_dim
        assert any(case.specialized for case in cases("attention", 90))

    seconds[str(special)] = 9.0
    with override(90, {"attention_forward": merged}):
        case = next(iter(tuner.training_cases("attention", 90)))
        arguments = (case, "attention_forward", [*others, special], None)
        found = tuner.fastest_rows(*arguments, torch.device("cpu"), "a GPU")
        again = json.loads(tuner.merged_table("attention_forward", 90, found))["90"]
    uses = [known["use"] for known in again if known["up_to"]["head_dim"] <= 64]
    assert uses == [others[1]], "it lost, and its row is replaced"


def test_benchmark_compares_both_generations(monkeypatch):
    setup = DeviceSetup(torch.device("cpu"), smoke=True)
    shape = bench_attention.AttentionShape("window", 1, (16,), 2, 1, 16, 5)
    assert [*bench_attention.case(setup, shape).implementations] == [OURS]
    monkeypatch.setattr(bench_attention, "fits", lambda *_: True)
    selected = []

    def attention(*_, **__):
        selected.append(rows_for("attention_forward", 0)[0]["use"])

    monkeypatch.setattr(bench_attention, "attention", attention)
    monkeypatch.setattr(bench_attention, "architecture", lambda device: 0)
    for call in bench_attention.case(setup, shape).implementations.values():
        call()
    assert [use.get("GENERATION", 1) for use in selected] == [1, 2, 2]
