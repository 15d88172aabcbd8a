"""A model eight times the memory budget, killed and resumed: the bits and the memory are right."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.manifest import read_manifest
from megagrow.checkpoint.source import open_checkpoint
from megagrow.offline.journal import JOURNAL_FILE
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Block
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.train.file_growths import base, model_file

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 16 * 2**20
PROGRAM = 300 * 2**20
"""Memory that a process may use besides the budget: Python, torch, and the rest of the imports."""
LAYERS = 5
SIZES = {
    "hidden_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1056,
    "vocab_size": 4099,
}
SCRIPT = """
import sys
from megagrow.cli.app import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("peak", status.split("VmHWM:")[1].split()[0], "deepspeed" in sys.modules)
"""


def start(path: Path, out: Path, to: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, "grow", str(path), str(out), "--to", to]
    command += ["--operator", "direct_depth", "--set", "growth.optimizer_state=transport"]
    command += ["--memory", str(BUDGET)]
    command += ["--zero-stage", "3", "--dp", "3", "--tp", "2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def kill_at_work(process: subprocess.Popen[str], journal: Path) -> int:
    """SIGKILL when some more is done; returns the peak of resident memory in bytes."""
    deadline = time.monotonic() + 120
    before = lines_of(journal)
    while lines_of(journal) < before + 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.slow
def test_memory_stays_in_the_budget_and_a_killed_growth_goes_on(tmp_path):
    model = base(num_hidden_layers=LAYERS, **SIZES)
    plan = parameter_plan(model, 1)
    state = random_state(plan)
    path = write_checkpoint(tmp_path / "in", model, layout_of(model, 1, 2, 1), state)
    assert sum(record.size for record in read_manifest(path).files.values()) > 8 * BUDGET
    to = model_file(tmp_path / "m.yaml", {**SIZES, "num_hidden_layers": 2 * LAYERS})
    out = tmp_path / "out"
    journal = tmp_path / "out.tmp" / JOURNAL_FILE
    peaks, done = [], [0]
    for _ in range(2):
        peaks.append(kill_at_work(start(path, out, to), journal))
        done.append(lines_of(journal))
    assert done == sorted(set(done)) and not out.exists()
    end = start(path, out, to)
    said, _ = end.communicate(timeout=240)
    assert end.returncode == 0
    _, peak, deepspeed = said.splitlines()[-1].split()
    assert deepspeed == "False"
    assert max(*peaks, int(peak) * 1024) < BUDGET + PROGRAM
    grown = open_checkpoint(out)
    for name, spec in grown.layout.plan.items():
        layer = spec.layer
        origin = (
            name if layer is None else name.replace(f"layers.{layer}", f"layers.{layer % LAYERS}")
        )
        for kind, wanted in state[origin].items():
            block = Block(range(spec.rows), range(spec.cols))
            assert torch.equal(grown.read(name, kind, block), wanted), (name, kind)
