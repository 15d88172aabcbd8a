"""Damaged and hostile files: always a clear error or a right load.

A small number of inputs; `python -m tests.fuzz --examples 10000` tries more of the same.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.helpers.fuzz.mutations import CANARY
from tests.helpers.fuzz.running import Outcome, Target, run
from tests.helpers.fuzz.targets import TARGETS

EXAMPLES = 100
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_a_clear_error_or_a_right_load(tmp_path: Path, target: Target) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    outcome = run(target, EXAMPLES, 0, folder)
    assert not outcome.failures, outcome.failures
    assert outcome.inputs >= EXAMPLES * 0.8
    assert outcome.loads > 0 and outcome.refusals > 0


def _found(tmp_path: Path, action) -> Outcome:
    return run(Target("bad", st.just(b"x"), lambda folder, _: action(folder)), 1, 0, tmp_path)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda _: {}["key"], "KeyError at test_fuzz.py"),
        (lambda _: bytearray(2**31), "MemoryError"),
        (lambda _: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda folder: (folder / CANARY).exists() or (folder / CANARY).write_text(""), "opened"),
    ],
)
def test_what_must_not_happen_is_seen(tmp_path: Path, action, said: str) -> None:
    (problem,) = _found(tmp_path, action).failures.items()
    assert said in str(problem)


def test_the_command_prints_a_table() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--examples", "20", "--only", "journal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "journal" in line)
    inputs, loads, refusals, failures = (int(word) for word in row.split()[1:5])
    assert inputs == loads + refusals and failures == 0
