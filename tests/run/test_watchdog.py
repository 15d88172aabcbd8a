"""Ranks that freeze, stay behind, die or fail: how soon the others end, what they say, and how."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megagrow.train.loop
from megagrow.config.schema import RunConfig
from megagrow.data.batches import BatchReader
from megagrow.parallel.engine import ZeroEngine
from tests.helpers.jobs import Finished, Hook, train, write_run
from tests.helpers.runs import STEP_TOKENS, make_run
from tools.faults.kill_points import run_point
from tools.faults.run import write_corpora

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WORLD = 3
PIPELINES, REPLICAS_OF_2 = 4, {"pipeline_model_parallel_size": 2, "zero_stage": 1}
HANG_TIMEOUT = 1.5
REACTION = 6.0
"""Seconds after the timeout: to look twice who is there, and for the others to wait for words."""
STEP = 5


def small_run(folder: Path, hang_timeout: float, world: int) -> RunConfig:
    batch = {"global_batch_size": 3, "micro_batch_size": 1}
    stage: dict[str, Any] = {"tokens": 20 * STEP_TOKENS, "batch": batch}
    if world == PIPELINES:
        stage |= {"batch": batch | {"global_batch_size": 8}, "parallel": REPLICAS_OF_2}
    return make_run(
        folder,
        [stage],
        guards={"hang_timeout": hang_timeout},
    )


def in_step(victim: int, does: Callable[[], object]) -> Hook:
    """Fault of one rank in the middle of a step."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        train_step, steps = megagrow.train.loop.train_step, []

        def stepping(*arguments: Any) -> Any:
            steps.append(None)
            if rank == victim and len(steps) == STEP:
                does()
            return train_step(*arguments)

        patch.setattr(megagrow.train.loop, "train_step", stepping)

    return hook


def in_schedule(victim: int, does: Callable[[], object]) -> Hook:
    """Fault of one rank in its second forward pass of a step."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        forward, passes = ZeroEngine.forward, []

        def passing(*arguments: Any) -> Any:
            passes.append(None)
            if rank == victim and len(passes) == (STEP - 1) * 4 + 2:
                does()
            return forward(*arguments)

        patch.setattr(ZeroEngine, "forward", passing)

    return hook


def while_reading(victim: int, does: Callable[[], object]) -> Hook:
    """Fault of one rank when it reads a batch."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        read = BatchReader.read

        def reading(self: BatchReader, position: int, indices: Any) -> Any:
            if rank == victim and position == (STEP - 1) * 3 * 16:
                does()
            return read(self, position, indices)

        patch.setattr(BatchReader, "read", reading)

    return hook


def send_self(number: signal.Signals) -> Callable[[], None]:
    def send() -> None:
        time.sleep(0.7)  # so that it was heard of in this phase
        os.kill(os.getpid(), number)

    return send


def ended(
    folder: Path, hook: Hook, victim: int, hang_timeout: float = 60, world: int = WORLD
) -> tuple[Finished, float]:
    """Exit of a job with one bad rank, and its number of seconds from its start."""
    begin = time.monotonic()
    run = small_run(folder, hang_timeout, world)
    job = train(write_run(folder / "run.yaml", run), world, hook)
    for rank, process in enumerate(job.ranks):
        if rank != victim:
            process.join(60)
    seconds = time.monotonic() - begin
    pid = job.ranks[victim].pid
    assert pid is not None
    if job.ranks[victim].is_alive():
        os.kill(pid, signal.SIGKILL)
    return job.finish(), seconds


def lines(done: Finished) -> list[str]:
    return [line for text in done.err for line in text.splitlines()]


def forever() -> None:
    time.sleep(3600)


@pytest.mark.parametrize(
    ("hook", "victim", "message"),
    [
        (
            in_step(2, send_self(signal.SIGSTOP)),
            2,
            "rank 2 is unresponsive (last heartbeat: step 5)",
        ),
        (
            in_step(0, send_self(signal.SIGSTOP)),
            0,
            "rank 0 does not answer",
        ),
        (
            while_reading(1, forever),
            1,
            "rank 1 is alive but behind (last heartbeat: reading the batch of step 5)",
        ),
        (
            in_step(1, forever),
            1,
            "rank 1 is alive but behind (last heartbeat: step 5)",
        ),
    ],
    ids=["frozen", "rank 0 frozen", "behind", "waiting for ever"],
)
def test_a_rank_that_does_not_get_on(tmp_path: Path, hook: Hook, victim: int, message: str) -> None:
    done, seconds = ended(tmp_path, hook, victim, HANG_TIMEOUT)
    print(done.err, seconds)
    alive = [code for rank, code in enumerate(done.codes) if rank != victim]
    assert alive == [4] * (WORLD - 1), done.err
    assert len(lines(done)) == (2 if victim == 0 else 1), "the others agree on who speaks"
    for line in lines(done):
        assert line.startswith("error: no progress in ")
        assert line.endswith(f" for 2 s; {message}; aborting all ranks (guards.hang_timeout)")
    assert seconds < 15 + HANG_TIMEOUT + REACTION


@pytest.mark.parametrize(
    ("victim", "does", "code", "message"),
    [
        (3, send_self(signal.SIGKILL), 5, "rank 3 exited or was killed"),
        (2, send_self(signal.SIGSTOP), 4, "rank 2 is unresponsive"),
        (1, forever, 4, "rank 1 is alive but behind"),
    ],
    ids=["killed", "frozen", "stuck"],
)
def test_a_pipeline_rank_is_lost_in_a_schedule(
    tmp_path: Path, victim: int, does: Callable[[], None], code: int, message: str
) -> None:
    timeout = 60.0 if code == 5 else HANG_TIMEOUT
    done, _ = ended(tmp_path, in_schedule(victim, does), victim, timeout, PIPELINES)
    assert [each for rank, each in enumerate(done.codes) if rank != victim] == [code] * 3
    (line,) = lines(done)
    slot = 2 if victim < 2 else 4
    assert f"{message} (last heartbeat: step 5, slot {slot} of 10); aborting all ranks" in line


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        (1, "rank 1 exited or was killed (last heartbeat: step 5)"),
        (0, "rank 0 exited or was killed"),
    ],
)
def test_a_rank_that_is_killed(tmp_path: Path, victim: int, message: str) -> None:
    done, seconds = ended(tmp_path, in_step(victim, send_self(signal.SIGKILL)), victim)
    print(done.err, seconds)
    assert done.codes[victim] == -signal.SIGKILL
    assert [code for rank, code in enumerate(done.codes) if rank != victim] == [5] * (WORLD - 1)
    assert set(lines(done)) == {f"error: {message}; aborting all ranks"}
    assert len(lines(done)) == (2 if victim == 0 else 1)


def fail() -> None:
    time.sleep(0.7)
    raise RuntimeError("a bug")


def test_a_rank_that_fails(tmp_path: Path) -> None:
    done, _ = ended(tmp_path, in_step(2, fail), 2)
    assert done.codes == [5, 5, 1]
    assert "RuntimeError: a bug" in done.err[2]
    assert sorted(done.err[:2]) == [
        "",
        "error: rank 2 exited or was killed (last heartbeat: step 5); aborting all ranks\n",
    ]


@pytest.mark.parametrize(
    ("point", "victim", "number", "words"),
    [
        ("data set-up", 1, signal.SIGSTOP, "rank 1 is unresponsive (last heartbeat: opening"),
        ("waiting for the lock", 1, signal.SIGKILL, "rank 1 exited or was killed (last heartbeat:"),
        ("engine of the growth", 1, signal.SIGKILL, "rank 1 exited or was killed (last "),
        ("last barrier", 0, signal.SIGKILL, "error: rank 0 exited or was killed; aborting"),
    ],
)
def test_a_rank_is_lost_outside_of_steps(
    tmp_path: Path, point: str, victim: int, number: int, words: str
) -> None:
    """All points: tools/faults/kill_points.py."""
    write_corpora(tmp_path / "train")
    (tmp_path / "job").mkdir()
    result = run_point(tmp_path / "job", point, 2, victim, number, hang_timeout=1.0)
    assert result.problem == "", result
    assert len(result.lines) == 1 and words in result.lines[0]
