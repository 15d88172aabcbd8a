"""A disk that fills up while a run saves: one line, the last checkpoint whole, and the same end."""

import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.checkpoint.save import Save
from megagrow.config.schema import RunConfig
from megagrow.train.loop import StepDone
from megagrow.train.reporting.run_logger import RunLogger
from tests.helpers.disks import small_disk
from tests.helpers.jobs import Hook, Job, records, train, write_run
from tests.helpers.run.refusals import completed_run, refused_run
from tests.helpers.runs import STEP_TOKENS, make_run

pytestmark = pytest.mark.dist

logger = logging.getLogger("megagrow.test")

DISK = 4 << 20
ROOM = 100 << 10
"""Less than what a rank saves: a disk with so much left has room for metrics only."""


def run_on(tmp: Path, disk: Path, interval: int = 6, background: bool = False) -> RunConfig:
    """A run of 12 steps whose every file lies on a disk."""
    return make_run(
        tmp,
        [{"tokens": 12 * STEP_TOKENS}],
        output_dir=disk / "run",
        checkpoint={"interval": interval, "background": background},
        validation={"interval": 2, "tokens": 256},
        logging={"tensorboard": True},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple[Any, ...]]:
    """The losses of the run where nothing goes wrong."""
    tmp = tmp_path_factory.mktemp("undisturbed")
    run = run_on(tmp, tmp)
    completed_run(write_run(tmp / "run.yaml", run))
    return losses(run)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of a few megabytes."""
    with small_disk(tmp_path / "disk", DISK) as folder:
        yield folder


def losses(run: RunConfig) -> list[tuple[Any, ...]]:
    """Every training and validation loss by step, to the bit."""
    return [row for kind in ("train", "validation") for row in records(run, kind, ("step", "loss"))]


def fill(disk: Path, left: int) -> None:
    """Takes all the space of a disk but `left` bytes, to the page."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - left)


def after_first_save(action: Callable[[], object], on_rank: int = 0) -> Hook:
    """Does something on one rank as soon as the first checkpoint is there."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        record = RunLogger.checkpoint

        def checkpoint(self: RunLogger, *args: Any) -> None:
            record(self, *args)
            patch.undo()
            action()

        # What is raised in a thread is shown to a user; pytest would keep it to itself.
        threading.excepthook = threading.__excepthook__
        if rank == on_rank:
            patch.setattr(RunLogger, "checkpoint", checkpoint)

    return hook


def whole_checkpoints(run: RunConfig) -> list[int]:
    """The steps of the checkpoints, each of which has to be whole; nothing else may be there."""
    folder = run.output_dir / "checkpoints"
    paths = list_checkpoints(folder)
    assert sorted(folder.iterdir()) == paths
    for path in paths:
        read_manifest(path)
    return [int(path.name.removeprefix("step-")) for path in paths]


@pytest.mark.parametrize(
    ("left", "culprit"),
    [(ROOM, "/checkpoints: not enough disk space: "), (0, " cannot be written (No space")],
    ids=["save", "metrics"],
)
def test_a_disk_that_fills_up(tmp_path, disk, undisturbed, left, culprit):
    run = run_on(tmp_path, disk)
    path = write_run(tmp_path / "run.yaml", run)
    said = refused_run(path, hook=after_first_save(lambda: fill(disk, left)))
    assert f"{run.output_dir}/" in said and culprit in said
    assert left == 0 or "step-000000012 was not saved: " in said
    assert whole_checkpoints(run) == [6]
    (disk / "filling").unlink()
    fill(disk, 0)
    assert "No space left on device" in refused_run(path), "it can not go on either"
    assert whole_checkpoints(run) == [6]
    (disk / "filling").unlink()
    completed_run(path)
    assert losses(run) == undisturbed
    assert whole_checkpoints(run) == [6, 12]


def limited_while_writing(rank: int, patch: pytest.MonkeyPatch) -> None:
    """Rank 1 may not write what the second save has begun to write."""
    write = Save.write

    def limited(self: Save, tensors: Any) -> Any:
        if rank == 1 and self.step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
        return write(self, tensors)

    patch.setattr(Save, "write", limited)


def test_a_write_that_fails_while_the_training_goes_on(tmp_path, undisturbed):
    run = run_on(tmp_path, tmp_path, interval=4, background=True)
    path = write_run(tmp_path / "run.yaml", run)
    said = refused_run(path, hook=limited_while_writing)
    assert "step-000000008 was not saved: rank 1: " in said and "File too large" in said
    assert said.endswith(f"the newest one is {run.output_dir}/checkpoints/step-000000004")
    assert whole_checkpoints(run) == [4]
    completed_run(path)
    assert losses(run) == undisturbed


def test_a_disk_without_room_for_one_checkpoint_is_told_at_once(tmp_path, disk):
    run = run_on(tmp_path, disk)
    fill(disk, ROOM)
    done = Job(tmp_path / "said", 2, ["train", str(write_run(tmp_path / "run.yaml", run))]).finish()
    assert done.codes == [2, 2]
    warning, first = (
        done.out[0].index(text) for text in ("not enough disk space for one checkpoint", "step 2 |")
    )
    assert warning < first
    assert f"{run.output_dir}/checkpoints: not enough disk space: " in done.out[0]


def test_a_file_that_one_rank_may_not_write(tmp_path, undisturbed):
    run = run_on(tmp_path, tmp_path)
    path = write_run(tmp_path / "run.yaml", run)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))

    said = refused_run(path, hook=after_first_save(limit, on_rank=1))
    assert "step-000000012 was not saved: rank 1: " in said
    assert "rank-00001.safetensors" in said and "File too large" in said
    assert said.endswith("the newest one is " + str(run.output_dir / "checkpoints/step-000000006"))
    assert whole_checkpoints(run) == [6]
    completed_run(path)
    assert losses(run) == undisturbed


def test_a_reader_of_the_log_that_ends(tmp_path, undisturbed):
    """All ranks, and a thread, write to a pipe whose reader has ended."""
    run, (read, write) = run_on(tmp_path, tmp_path), os.pipe()

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        os.close(read)
        for descriptor in (1, 2):
            os.dup2(write, descriptor)
        os.close(write)
        step = RunLogger.step

        def warning(self: RunLogger, event: StepDone) -> None:
            step(self, event)
            if event.state.counters.step > 4:
                thread = threading.Thread(target=logger.warning, args=("rank %d", rank))
                thread.start()
                thread.join()
                print("a library", file=sys.stderr)

        patch.setattr(RunLogger, "step", warning)

    job = train(write_run(tmp_path / "run.yaml", run), 2, hook)
    os.close(write)
    with os.fdopen(read) as reader:
        assert any(" | start | " in line for line in reader)
    assert job.finish().codes == [0, 0]
    assert losses(run) == undisturbed and whole_checkpoints(run) == [6, 12]
    first = (run.output_dir / "train.log").read_text()
    other = (run.output_dir / "train-rank-00001.log").read_text()
    assert " failed (Broken pipe); it continues here\n" in first
    assert "| rank 0 | run test | done | 12 steps" in first
    for rank, text in enumerate((first, other)):
        assert text.count(f"| rank {rank} | warning: rank {rank}\n") == 8
        assert text.count("a library\n") == 8
