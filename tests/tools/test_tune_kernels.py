"""Tests of the kernel tuner without a GPU: candidates, selection and written tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tools.gpu.tune_kernels as tuner
from megagrow_kernels.tiles import row, rows, rows_for
from tools.gpu.kernel_candidates import (
    TABLE_FEATURES,
    candidates,
    choose,
    format_table,
    is_specialized,
    merge_rows,
    row_conditions,
)
from tools.gpu.kernel_cases import OPS, KernelCase, tables
from tools.gpu.kernel_code import CompileJob, CompileResult, KernelCode

ROOT = Path(__file__).resolve().parents[2]
TUNED = [op for op in OPS if op != "add_rms_norm"]


def row_of(use: int, measured: bool = False, when: dict | None = None, **up_to: int) -> dict:
    note = {"device": "a GPU"} if measured else None
    return {"when": when or {}, "up_to": up_to, "use": {"BLOCK": use}, "measured": note}


def test_every_table_is_known():
    files = {path.stem for path in tuner.FOLDER.glob("*.json")}
    assert set(tables()) == set(TABLE_FEATURES) == files
    for table in tables():
        for listed in rows(table).values():
            for known in listed:
                assert {*known["when"], *known["up_to"]} <= set(TABLE_FEATURES[table]), table


@pytest.mark.parametrize("op", TUNED)
@pytest.mark.parametrize("architecture", [80, 90])
def test_candidates_are_what_rows_hold(op, architecture):
    cases = list(tuner.training_cases(op, architecture))
    assert cases
    for case in cases:
        for table, taken in case.rows.items():
            listed = candidates(table, case.features, architecture)
            assert 5 <= len(listed) <= 200
            assert len({str(tiles) for tiles in listed}) == len(listed)
            asked = taken["use"].keys() - {"num_stages", "SEPARATE"}
            assert all(asked <= tiles.keys() for tiles in listed if not is_specialized(tiles))


def test_tiles_in_use_are_candidates():
    """The initial hand-chosen tiles are among the candidates."""
    for op in TUNED:
        for case in tuner.training_cases(op, 90):
            for table, taken in case.rows.items():
                assert taken["use"] in candidates(table, case.features, 90), (table, case.features)


def test_cases_are_those_of_training():
    widths = [case.features["width"] for case in tuner.training_cases("rms_norm", 90)]
    assert widths == [1024, 2048, 2560, 4096]
    assert {case.arguments["dtype"] for case in tuner.training_cases("attention", 90)} == {
        "bfloat16"
    }
    assert {case.arguments["window"] for case in tuner.training_cases("attention", 90)} == {None}


def test_impossible_candidates_are_dropped():
    good = KernelCode("_forward_kernel", "h", 100, 0, 0, 0, 1024, True, {"HGMMA": 8}, False)
    codes = {
        "good": good,
        "spills": KernelCode(
            "_forward_kernel", "h", 255, 64, 0, 12, 1024, True, {"HGMMA": 8}, False
        ),
        "shared": KernelCode(
            "_forward_kernel", "h", 100, 0, 0, 0, 232449, True, {"HGMMA": 8}, False
        ),
        "slow": KernelCode(
            "_forward_kernel", "h", 100, 0, 0, 0, 1024, True, {"HGMMA": 0, "HMMA": 8}, False
        ),
    }
    outcomes = [
        CompileResult(
            CompileJob(90, "attention", {}, tiles={"attention_forward": {"BLOCK_M": i}}), (code,)
        )
        for i, code in enumerate(codes.values())
    ]
    died = CompileJob(90, "attention", {}, tiles={"attention_forward": {"BLOCK_M": 9}})
    outcomes.append(CompileResult(died, error="the compiler aborted its process"))
    assert tuner.valid_tiles(outcomes) == [{"BLOCK_M": 0}]


def test_the_first_of_equally_fast_tiles_is_taken():
    assert choose([({"A": 1}, 2.0), ({"A": 2}, 1.005), ({"A": 3}, 1.0), ({"A": 4}, 1.5)]) == (
        {"A": 2},
        1.005,
    )
    assert choose([({"A": 1}, 1.02), ({"A": 2}, 1.0)]) == ({"A": 2}, 1.0)


def test_conditions_are_written_as_the_table_does():
    names = ("width", "bytes")
    features = {"width": 2048, "bytes": 2, "window": None}
    exact = [row_of(1, when={"bytes": 4}, width=100)]
    assert row_conditions(names, features, exact) == {
        "when": {"bytes": 2},
        "up_to": {"width": 2048},
    }
    assert row_conditions(names, features, []) == {"when": {}, "up_to": {"width": 2048, "bytes": 2}}


def test_measured_rows_take_the_place_of_those_they_cover():
    names = ("width", "bytes")
    known = [
        row_of(1, width=128),
        row_of(2, width=2048, bytes=2),
        row_of(3, width=2048),
        row_of(4, width=4096),
        row_of(5),
    ]
    new = [row_of(8, True, width=4096, bytes=2), row_of(7, True, width=2048, bytes=2)]
    uses = [known["use"]["BLOCK"] for known in merge_rows(names, known, new)]
    assert uses == [1, 7, 3, 8, 4, 5]
    again = merge_rows(names, merge_rows(names, known, new), new)
    assert [known["use"]["BLOCK"] for known in again] == uses


def test_rows_of_another_kind_are_left_alone():
    names = ("head_dim", "bytes")
    known = [row_of(1, when={"bytes": 2}, head_dim=64), row_of(2, when={"bytes": 4}, head_dim=64)]
    new = [row_of(3, True, when={"bytes": 2}, head_dim=64)]
    assert [known["use"]["BLOCK"] for known in merge_rows(names, known, new)] == [3, 2]


class Clock:
    """Timer that makes every call and reports the fourth as the fastest."""

    def compare(self, calls):
        for call in calls.values():
            call()
        return {name: 1e-4 if name == "3" else 1e-3 for name in calls}


@pytest.fixture
def in_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let interpreted kernels use the tables of an H100 for CPU tensors."""
    monkeypatch.setattr(tuner, "architecture", lambda device: 0)


def test_wrong_candidates_are_recorded_and_not_timed(in_interpreter):
    arguments = {"batch": 1, "sequence": 20, "heads": 1, "groups": 1, "head_dim": 8}
    case = KernelCase("attention", {}, arguments | {"dtype": "float32"}, {})
    right = {"BLOCK_M": 16, "BLOCK_N": 16, "EDGE_N": 16, "DESCRIPTORS": 0}
    listed = [right, right | {"BLOCK_M": 256}, right | {"EDGE_N": 24}]
    kept, wrong = tuner.compare_tiles(case, "attention_forward", listed, torch.device("cpu"))
    assert kept == [right]
    assert [record["tiles"] for record in wrong] == listed[1:]
    assert "divide a tile" in wrong[0]["result"]["problem"] and "problem" in wrong[1]["result"]
    records = [json.dumps(record) for record in wrong]
    assert all("attention_forward" in text for text in records)


def test_a_candidate_that_forgets_rows_is_wrong(in_interpreter, monkeypatch):
    from megagrow_kernels import attention

    forward = attention.attention_forward

    def broken(*given):
        out, logsumexp = forward(*given)
        out[:, -1] = 0
        return out, logsumexp

    monkeypatch.setattr(attention, "attention_forward", broken)
    arguments = {"batch": 1, "sequence": 20, "heads": 1, "groups": 1, "head_dim": 8}
    case = KernelCase("attention", {}, arguments | {"dtype": "float32"}, {})
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "EDGE_N": 16, "DESCRIPTORS": 0}
    kept, wrong = tuner.compare_tiles(case, "attention_forward", [tiles], torch.device("cpu"))
    assert kept == [] and wrong[0]["result"]["tensor"] == "output"


def test_the_fastest_is_measured_and_written(in_interpreter):
    case = KernelCase("swiglu", {"bytes": 4}, {"rows": 3, "width": 50, "dtype": "float32"}, {})
    tried = candidates("swiglu", case.features, 90)[:6]
    best, seconds = tuner.fastest(case, "swiglu", tried, Clock(), torch.device("cpu"))
    assert (best, seconds) == (tried[3], 1e-4)
    measured = tuner.measured_row("swiglu", case, 90, best, seconds, "a GPU")
    assert measured["measured"] | {"date": None} == {
        "device": "a GPU",
        "date": None,
        "microseconds": 100.0,
    }
    before = json.dumps(rows("swiglu"))
    merged_table = json.loads(tuner.merged_table("swiglu", 90, [measured]))
    assert json.dumps(rows("swiglu")) == before
    assert measured in merged_table["90"]
    assert {key: value for key, value in merged_table.items() if key != "90"} == {
        str(key): value for key, value in rows("swiglu").items() if key != 90
    }
    taken = [known for known in merged_table["90"] if known["up_to"].get("bytes", 4) >= 4]
    assert taken[0] == measured


@pytest.mark.parametrize("table", tables())
def test_a_table_is_written_as_it_stands(table):
    path = tuner.FOLDER / f"{table}.json"
    assert json.loads(format_table(rows(table))) == json.loads(path.read_text(encoding="utf-8"))
    assert (
        format_table(rows(table)).count("\n")
        == len(path.read_text(encoding="utf-8").split("\n")) - 1
    )


def test_an_architecture_without_rows_of_its_own_gets_them(monkeypatch):
    """A table of sm_80 only, tuned on an H100: unmeasured cases keep their previous rows."""
    known = rows_for("rope", 90)
    assert known is rows_for("rope", 80) or 90 in rows("rope")
    case = next(tuner.training_cases("rope", 90))
    measured = tuner.measured_row("rope", case, 90, {"TOKENS": 3}, 1e-5, "a GPU")
    merged_table = json.loads(tuner.merged_table("rope", 90, [measured]))
    assert measured in merged_table["90"]
    largest = row("rope", 90, head_dim=256)
    assert largest in merged_table["90"]


def test_it_needs_a_gpu():
    command = [sys.executable, str(ROOT / "tools/gpu/tune_kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "tune_kernels needs a GPU: torch.cuda.is_available() is False\n"
