import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.errors import InputError
from megagrow.train.reporting.metrics import Counters, MetricsLog, read_metrics, train_fields
from tests.helpers.train.records import measure, train


def open_log(directory: Path) -> MetricsLog:
    return MetricsLog(directory)


def test_train_record_holds_what_is_promised(tmp_path: Path) -> None:
    seen = measure(0)
    with open_log(tmp_path) as log:
        log.write(
            "train", Counters().after_step(seen).add_lost_time(2.0), **train_fields(seen, 8e4)
        )
    (record,) = read_metrics(log.path)
    assert 0 <= time.time() - record.pop("time") < 60
    assert record == {
        "kind": "train", "step": 1, "tokens": 64, "flops": 6.4e3, "flops_true": 8e3,
        "elapsed_seconds": 2.5, "lost_seconds": 2.0, "growth_tokens": 0, "growth_flops": 0.0,
        "growth_flops_true": 0.0, "skipped_steps": 0, "rewinds": 0, "stage": 0, "loss": 5.0,
        "lr": 1e-3, "grad_norm": 1.5, "position": 0, "skipped": False,
        "tokens_per_second": 128.0, "mfu": 0.2, "memory_bytes": 1 << 20, "seconds": 0.5,
    }  # fmt: skip


def test_mfu_is_null_without_a_known_peak() -> None:
    assert train_fields(measure(0), None)["mfu"] is None


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write("start", Counters(), name="run")
    assert json.loads(log.path.read_text())["name"] == "run"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_know_become_null(value: float, tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write("validation", Counters(), loss=value)
    assert read_metrics(log.path)[0]["loss"] is None


@settings(max_examples=25, deadline=None)
@given(saved=st.integers(0, 11), killed=st.integers(0, 12), cut=st.integers(0, 80))
def test_resumed_file_is_the_undisturbed_one(
    saved: int, killed: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Saved at one step, killed at a later one in mid-line, resumed: byte for byte the same."""
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: 1.5)
        train(open_log(whole), Counters(), 12)
        log = open_log(broken)
        counters = train(log, Counters(), saved)
        train(log, counters, max(saved, killed))
        if killed > saved and cut:
            log.path.write_bytes(log.path.read_bytes()[:-cut])
        again = open_log(broken)
        again.truncate_after(saved)
        train(again, counters, 12)
    assert again.path.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_growth_at_the_checkpoints_own_step_is_undone(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write("start", Counters())
    counters = train(log, Counters(), 3)
    log.write("checkpoint", counters, stage=0)
    before = read_metrics(log.path)
    log.write("growth", counters, stage=1)
    log.write("validation", counters, stage=1, loss=1.0)
    after = read_metrics(log.path)
    log.write("start", counters)
    log.truncate_after(3, stage=1)
    assert read_metrics(log.path)[:-1] == after
    log.truncate_after(3, stage=0)
    assert read_metrics(log.path)[:-1] == before
    log.truncate_after(-1)
    assert [record["kind"] for record in read_metrics(log.path)] == ["start", "start"]


def test_records_are_synced_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, synced = open_log(tmp_path), []
    log.sync()
    train(log, Counters(), 2)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    log.sync()
    assert synced == [log.path.stat().st_ino]


def test_cut_last_line_is_passed_over(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    train(log, Counters(), 2)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-10])
    assert [record["step"] for record in read_metrics(log.path)] == [1]
    log.path.write_bytes(whole[:-1])
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2]


BROKEN = ["{half", "[1, 2]", '{"step": 1}', "", "\udcff", "[" * 100_000]
WRONG = [
    '{"kind": "train", "flops": 1, ' + rest
    for rest in (
        '"step": "1", "tokens": 1}',
        '"step": 1.5, "tokens": 1}',
        '"step": 1, "tokens": 1, "stage": "0"}',
        '"step": 1, "tokens": 1, "loss": NaN}',
        '"step": 1, "tokens": 1, "loss": 1e999}',
        '"step": 1, "tokens": 1, "step": 2}',
    )
]
"""No step to compare, or numbers that could not be written again."""


@pytest.mark.parametrize("line", [*BROKEN, *WRONG])
def test_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"kind": "end", **asdict(Counters())})
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2: not a metrics record"):
        read_metrics(path)
    with pytest.raises(InputError, match="line 2"):
        open_log(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.path.symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left on device"):
        log.write("start", Counters())
