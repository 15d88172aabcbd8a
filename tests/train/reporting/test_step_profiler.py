"""Traces of steps: their steps, their content, and a folder that cannot be written."""

import json
import logging
from pathlib import Path

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.train.reporting.step_profiler import StepProfiler
from tests.helpers.runs import STEP_TOKENS, make_run


def run_with(folder: Path, *steps: int) -> RunConfig:
    return make_run(
        folder,
        [{"tokens": STEP_TOKENS}],
        logging={"tensorboard": False, "profile": {"steps": steps}},
    )


def products(profiler: StepProfiler, first: int, last: int) -> None:
    """Multiply a matrix of as many rows as the number of the step, in each step."""
    profiler.completed(first - 1)
    for step in range(first, last + 1):
        torch.ones(step, 3) @ torch.ones(3, 3)
        profiler.completed(step)
    profiler.close()


def traces(folder: Path) -> dict[str, int]:
    """Return the number of matrix products in each trace."""
    found = {}
    for path in (folder / "run/profile").glob("*"):
        events = json.loads(path.read_text())["traceEvents"]
        found[path.name] = sum(event.get("name") == "aten::mm" for event in events)
    return found


@pytest.mark.parametrize(
    ("first", "last", "trace"),
    [
        (1, 8, {"steps-3-5.json": 3}),
        (3, 8, {"steps-3-5.json": 3}),
        (4, 8, {"steps-4-5.json": 2}),
        (1, 3, {"steps-3-3.json": 1}),
        (6, 8, {}),
    ],
)
def test_the_steps_of_the_run_file_are_traced(
    tmp_path: Path, first: int, last: int, trace: dict[str, int]
) -> None:
    products(StepProfiler(run_with(tmp_path, 3, 5), enabled=True), first, last)
    assert traces(tmp_path) == trace


def test_the_other_ranks_and_runs_without_the_key_write_nothing(tmp_path: Path) -> None:
    products(StepProfiler(run_with(tmp_path, 1, 2), enabled=False), 1, 4)
    without = make_run(tmp_path, [{"tokens": STEP_TOKENS}])
    products(StepProfiler(without, enabled=True), 1, 4)
    assert not (tmp_path / "run").exists()


def test_steps_after_a_rewind_are_not_traced_again(tmp_path: Path) -> None:
    profiler = StepProfiler(run_with(tmp_path, 1, 2), enabled=True)
    products(profiler, 1, 4)
    products(profiler, 1, 4)
    assert traces(tmp_path) == {"steps-1-2.json": 2}


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megagrow"), "propagate", True)
    (tmp_path / "run").write_text("a file, not a directory")
    products(StepProfiler(run_with(tmp_path, 1, 2), enabled=True), 1, 4)
    messages = [record.getMessage() for record in caplog.records]
    (warning,) = {message for message in messages if "trace" in message}
    assert warning.startswith(f"{tmp_path}/run/profile/steps-1-2.json: the trace cannot be written")


@pytest.mark.parametrize("steps", [(5, 3), (1, 101)])
def test_steps_in_the_wrong_order_or_too_many(tmp_path: Path, steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at most 100 steps, such as"):
        run_with(tmp_path, *steps)
