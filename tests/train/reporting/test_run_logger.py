"""The log of rank 0 when a run resumes."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from megagrow.common.log_setup import ConsoleHandler
from megagrow.config.load import load_run
from megagrow.train.reporting.metrics import METRICS_FILE, Counters, read_metrics
from megagrow.train.reporting.run_files import CONFIG_FILE, write_run_files
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.train_state import RunState
from tests.helpers.logs import captured_logs
from tests.helpers.runs import STEP_TOKENS, make_run


@pytest.mark.parametrize("deleted", [False, True], ids=["lines", "file"])
def test_lost_records_are_reported_once(tmp_path: Path, deleted: bool) -> None:
    run = make_run(tmp_path, [{"tokens": 90 * STEP_TOKENS}], logging={"interval": 10})
    path = run.output_dir / METRICS_FILE

    def logged(step: int) -> list[str]:
        """Resume from `step`, write the records of 40 steps, and return the warnings."""
        state = RunState(counters=Counters(step=step, tokens=step * STEP_TOKENS))
        with RunLogger(run, 0, 1, {}, ConsoleHandler(Console()), torch.device("cpu")) as log:
            log.open()
            with captured_logs() as messages:
                log.start(run, state, tmp_path if step else None, [])
            for number in range(step, step + 40, 10):
                log._metrics.write("train", Counters(step=number + 10), stage=0)
            log.sync()
            log.check()
        return [line for line in messages if "no record" in line]

    assert logged(0) == []
    lines = path.read_text().splitlines(keepends=True)
    path.unlink() if deleted else path.write_text("".join(lines[:2] + lines[4:]))
    lost = "10 to 40" if deleted else "20 to 30"
    assert logged(40) == [f"{path}: no record of step {lost}; curves have a gap there"]
    assert logged(40) == []
    found = [record for record in read_metrics(path) if record["kind"] == "lost"]
    assert [(record["step"], record["steps"]) for record in found] == [
        (40, [[10, 40] if deleted else [20, 30]])
    ]


def test_earlier_configurations_are_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}])
    run.output_dir.mkdir()
    first, second = (run.model_copy(update={"seed": seed}) for seed in (1, 2))
    (run.output_dir / CONFIG_FILE).write_bytes(b"\xff\x00")  # unreadable
    for each in (first, first, second, first):
        write_run_files(each, {})
    kept = [path.name for path in sorted(run.output_dir.glob("config*.yaml"))]
    assert kept == ["config-0001.yaml", "config-0002.yaml", "config-0003.yaml", CONFIG_FILE]
    found = [load_run(run.output_dir / name).seed for name in kept[1:]]
    assert found == [1, 2, 1]


def test_a_rewind_ends_the_trace(tmp_path: Path) -> None:
    profile = {"steps": [2, 9]}
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}], logging={"profile": profile})
    states = {step: RunState(counters=Counters(step=step)) for step in range(5)}
    with RunLogger(run, 0, 1, {}, ConsoleHandler(Console()), torch.device("cpu")) as log:
        log.open()
        log.start(run, states[0], None, [])
        for step in (1, 2, 3, 4):
            log._profiler.completed(step)
        log.rewind(states[4], states[1], None, "loss spike", [])
        log._profiler.completed(2)
    assert [path.name for path in (run.output_dir / "profile").iterdir()] == ["steps-2-4.json"]
