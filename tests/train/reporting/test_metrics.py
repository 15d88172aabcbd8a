import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.errors import InputError
from megagrow.train.reporting.metrics import (
    Counters,
    MetricsLog,
    StepMetrics,
    read_metrics,
    train_fields,
)


def measure(step: int, stage: int = 0, **changes: Any) -> StepMetrics:
    fields = {
        "stage": stage,
        "loss": 5.0 - step / 7,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "tokens": 64,
        "flops": 6.4e3,
        "flops_true": 8e3,
        "seconds": 0.5,
        "memory_bytes": 1 << 20,
        "position": 64 * step,
    }
    return StepMetrics(**{**fields, **changes})


def open_log(directory: Path) -> MetricsLog:
    return MetricsLog(directory, False, None, "run")


def train(log: MetricsLog, counters: Counters, until: int, stage: int = 0) -> Counters:
    """Steps up to `until`, a validation after every third."""
    while counters.step < until:
        seen = measure(counters.step, stage)
        counters = counters.after_step(seen)
        log.write("train", counters, **train_fields(seen, None))
        if counters.step % 3 == 0:
            log.write("validation", counters, stage=stage, loss=4.0 - counters.step / 9)
    return counters


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


def test_an_evaluation_is_written_and_shown_by_task_and_metric(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {"piqa": {"acc": 0.5}, "wikitext": {"word_perplexity": math.inf}}
    with MetricsLog(tmp_path, True, None, "run") as log:
        log.write("evaluation", Counters(step=3), stage=0, results=found, average=0.5)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["results"] == {"piqa": {"acc": 0.5}, "wikitext": {"word_perplexity": None}}
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (shown,) = events.Scalars("evaluation/results/piqa/acc")
    assert (shown.step, shown.value) == (3, 0.5)
    assert "evaluation/average" in events.Tags()["scalars"]


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every event that TensorBoard shows, by scalar."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return {tag: values for tag, values in found.items() if values}


def numbers(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(directory / "metrics.jsonl"):
        for key, value in record.items():
            if key not in ("kind", "step") and isinstance(value, int | float):
                found.setdefault(f"{record['kind']}/{key}", []).append(
                    (record["step"], float(value))
                )
    return found


def assert_shown(directory: Path) -> None:
    """TensorBoard shows the records of metrics.jsonl, in order."""
    found, right = shown(directory), numbers(directory)
    assert found.keys() == right.keys()
    for tag, events in right.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in events], tag
        values = [value for _, value in events]
        assert [value for _, value in found[tag]] == pytest.approx(values), tag


def undone(log: MetricsLog, counters: Counters, step: int, stage: int = 0) -> None:
    """Records that do not stay."""
    train(log, counters, step, stage)
    log.write("evaluation", counters, stage=stage + 1, average=99.0)


@pytest.mark.parametrize("clock", [0, -86400 * 365], ids=["clock", "clock set back"])
@pytest.mark.parametrize("restarts", [False, True], ids=["rewind", "resume"])
def test_tensorboard_shows_what_metrics_have(
    tmp_path: Path, restarts: bool, clock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path, True, None, "run")
    log.truncate_after(-1)
    kept = train(log, Counters(), 3)
    log.write("checkpoint", kept, stage=0)
    undone(log, kept, 7)
    now = time.time() + clock
    monkeypatch.setattr(time, "time", lambda: now)
    if restarts:
        log = MetricsLog(tmp_path, True, None, "run")
    log.truncate_after(3, stage=0)
    again = train(log, kept, 5)
    assert_shown(tmp_path)
    undone(log, again, 9)
    log.truncate_after(5, stage=0)
    log.truncate_after(3, stage=0)
    train(log, kept, 6)
    assert_shown(tmp_path)
    assert [step for step, _ in shown(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_wandb_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, shown = [], []
    run = SimpleNamespace(
        log=lambda scalars, step: shown.append((step, scalars)), finish=lambda: shown.append("end")
    )
    fake = SimpleNamespace(init=lambda **settings: asked.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        with MetricsLog(tmp_path, False, "project", "run") as log:
            log.write("validation", Counters(step=3), loss=2.5)
    assert asked[0] == asked[1]
    assert (asked[0]["project"], asked[0]["name"], asked[0]["resume"]) == (
        "project",
        "run",
        "allow",
    )
    assert shown[0][0] == 3
    assert shown[0][1]["validation/loss"] == 2.5
    assert shown[1] == shown[3] == "end"


def test_wandb_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is missing: pip install"):
        MetricsLog(tmp_path, False, "project", "run")
