"""tools/benchmarks/training/run.py: its ratios, its clock, and a tiny run of two contestants."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.benchmarks.training.ours import Clock
from tools.benchmarks.training.tables import ratio

ROOT = Path(__file__).resolve().parents[2]


def test_a_ratio_is_the_median_of_those_within_the_rounds() -> None:
    """A round in which the machine was slow for one of the two does not count."""
    rows = [
        {"contestant": "ours", "wall": [1.0, 9.0, 2.0], "cpu": [1.0, 1.0, 1.0]},
        {"contestant": "loop", "wall": [1.1, 1.0, 2.4], "cpu": [2.0, 3.0, 4.0]},
    ]
    assert ratio(rows, "ours", "loop", "wall") == pytest.approx(1.1)
    assert ratio(rows, "ours", "loop", "cpu") == pytest.approx(3.0)
    assert ratio(rows, "loop", "ours", "cpu") == pytest.approx(1 / 3)


def test_the_parts_of_a_step_add_up() -> None:
    """What runs within a part is taken out of it."""
    work = SimpleNamespace(inner=lambda: time.sleep(0.02))
    work.outer = lambda: (time.sleep(0.01), work.inner())
    clock = Clock()
    clock.wrap(work, "inner", "inside")
    clock.wrap(work, "outer", "around")
    begin = time.perf_counter()
    work.outer()
    spent = time.perf_counter() - begin
    parts = clock.read()
    assert parts["inside"] >= 0.02
    assert parts["around"] >= 0.01
    assert spent - 0.005 < sum(parts.values()) <= spent
    assert clock.read() == {}


def test_two_contestants_take_turns(tmp_path: Path) -> None:
    """The whole benchmark on a tiny model: both train all their steps, in processes of their own,
    and what their rounds took is told."""
    only = ("--only", "loop, our model", "--only", "ours, timed")
    options = ("--quick", "--no-preparing", "--threads", "1", "--output", str(tmp_path))
    command = [sys.executable, str(ROOT / "tools/benchmarks/training/run.py"), *only, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    loop, ours = results["training"]
    assert [loop["contestant"], ours["contestant"]] == ["loop, our model", "ours, timed"]
    for row in (loop, ours):
        assert len(row["wall"]) == len(row["cpu"]) == 2
        assert row["start_seconds"] > row["step_seconds"] > 0
    assert not loop["parts"]
    assert {"forward", "backward", "AdamW", "metrics", "reading batches"} <= ours["parts"].keys()
    assert sum(ours["parts"].values()) < 1.5 * ours["step_seconds"]
    assert "| loop, our model | 1 |" in (tmp_path / "training.md").read_text(encoding="utf-8")
