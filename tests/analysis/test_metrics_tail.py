"""Incremental reading of metrics.jsonl."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.analysis.curves import load_any_curves, load_curves
from megagrow.analysis.metrics_tail import MetricsTail, average_pairs
from megagrow.errors import DataError
from megagrow.train.reporting.metrics import MetricsLog
from tests.helpers.analysis.records import append

STAGES = [(20, 1000), (30, 4000, 1e8)]


def test_appended_lines_are_read_once(make_run: Callable[..., Path]) -> None:
    folder = make_run("grown", STAGES)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]) + lines[20][:30])
    tail = MetricsTail(path)
    assert tail.poll() and not tail.poll()
    first = tail.records[3]
    with path.open("a") as file:
        file.write(lines[20][30:] + "".join(lines[21:]))
    assert tail.poll()
    assert tail.records[3] is first
    assert load_any_curves(folder, tail.records) == load_curves(folder)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_truncated_file_is_read_again(make_run: Callable[..., Path], in_place: bool) -> None:
    """A resume replaces the file; an editor or a copy may write into the same one."""
    folder = make_run("grown", STAGES, end=False)
    path = folder / "metrics.jsonl"
    tail = MetricsTail(path)
    tail.poll()
    if in_place:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= 12))
    else:
        with MetricsLog(folder) as log:
            log.truncate_after(12)
    assert tail.poll()
    assert [max(record["step"] for record in tail.records), tail.poll()] == [12, False]


def test_long_runs_are_averaged(make_run: Callable[..., Path]) -> None:
    folder = make_run("grown", STAGES, noise=0.1)
    tail = MetricsTail(folder / "metrics.jsonl", most_records=40)
    tail.poll()
    exact, averaged = load_curves(folder), load_any_curves(folder, tail.records)
    assert len(averaged.train.loss) < 40
    assert (averaged.tokens, averaged.flops, averaged.growths) == (
        exact.tokens,
        exact.flops,
        exact.growths,
    )
    assert averaged.validation == exact.validation
    assert averaged.train_unsmoothed[0] == pytest.approx(sum(exact.train_unsmoothed[:2]) / 2)


def test_pairs_never_cross_a_stage_or_another_record() -> None:
    steps = [(0, 4.0), (0, 2.0), (0, 3.0), (1, 8.0), (1, 6.0)]
    records = [
        {"kind": "train", "step": at, "stage": stage, "loss": loss}
        for at, (stage, loss) in enumerate(steps)
    ]
    result = average_pairs([*records[:2], {"kind": "validation", "loss": 9.0}, *records[2:]])
    kept = [(record.get("step"), record["loss"]) for record in result]
    assert kept == [(1, 3.0), (None, 9.0), (2, 3.0), (4, 7.0)]
    assert result[0]["mfu"] is None


def test_only_the_last_samples_are_kept(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [(20, 1000)])
    for text in "abc":
        append(folder, kind="samples", samples=[{"prompt": "", "text": text}])
    tail = MetricsTail(folder / "metrics.jsonl")
    tail.poll()
    kept = [record["samples"] for record in tail.records if record["kind"] == "samples"]
    assert kept == [[{"prompt": "", "text": "c"}]]


def test_a_damaged_line_is_an_error_until_it_is_gone(make_run: Callable[..., Path]) -> None:
    path = make_run("run", [(20, 1000)]) / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + "{}\n")
    tail = MetricsTail(path)
    for _ in range(2):
        with pytest.raises(DataError, match="line 25: not a metrics record"):
            tail.poll()
    path.write_text(text)
    assert tail.poll()
    path.unlink()
    with pytest.raises(DataError, match="no such file; wait until the run has started"):
        tail.poll()
