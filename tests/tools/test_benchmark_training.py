"""Training benchmark: speedups, the part timer, and a tiny run of two configurations."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.benchmarks.training.ours import PartTimer
from tools.benchmarks.training.tables import ratio

ROOT = Path(__file__).resolve().parents[2]


def test_a_speedup_is_the_median_over_the_rounds() -> None:
    """One slow round does not change the result."""
    rows = [
        {"configuration": "ours", "wall": [1.0, 9.0, 2.0], "cpu": [1.0, 1.0, 1.0]},
        {"configuration": "loop", "wall": [1.1, 1.0, 2.4], "cpu": [2.0, 3.0, 4.0]},
    ]
    assert ratio(rows, "ours", "loop", "wall") == pytest.approx(1.1)
    assert ratio(rows, "ours", "loop", "cpu") == pytest.approx(3.0)
    assert ratio(rows, "loop", "ours", "cpu") == pytest.approx(1 / 3)


def test_the_parts_of_a_step_add_up() -> None:
    """The time of a nested part is subtracted from the enclosing part."""
    work = SimpleNamespace(inner=lambda: time.sleep(0.02))
    work.outer = lambda: (time.sleep(0.01), work.inner())
    timer = PartTimer()
    timer.wrap(work, "inner", "inside")
    timer.wrap(work, "outer", "around")
    begin = time.perf_counter()
    work.outer()
    spent = time.perf_counter() - begin
    parts = timer.read()
    assert parts["inside"] >= 0.02
    assert parts["around"] >= 0.01
    assert spent - 0.005 < sum(parts.values()) <= spent
    assert timer.read() == {}


def test_two_configurations_train_in_turn(tmp_path: Path) -> None:
    """Both train all steps in separate processes, and all rounds are reported."""
    only = ("--only", "loop, our model", "--only", "ours, timed")
    options = ("--quick", "--no-preparing", "--threads", "1", "--output", str(tmp_path))
    command = [sys.executable, str(ROOT / "tools/benchmarks/training/run.py"), *only, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    loop, ours = results["training"]
    assert [loop["configuration"], ours["configuration"]] == ["loop, our model", "ours, timed"]
    for row in (loop, ours):
        assert len(row["wall"]) == len(row["cpu"]) == 2
        assert row["start_seconds"] > row["step_seconds"] > 0
    assert not loop["parts"]
    parts = {"forward", "backward", "AdamW", "metrics", "waiting for batches"}
    assert parts <= ours["parts"].keys()
    assert sum(ours["parts"].values()) < 1.5 * ours["step_seconds"]
    assert "| loop, our model | 1 |" in (tmp_path / "training.md").read_text(encoding="utf-8")
