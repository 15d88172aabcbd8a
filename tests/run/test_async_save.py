"""Saving goes on beside the training, one save at a time, and changes nothing of it."""

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.discovery import list_checkpoints, step_of
from megagrow.checkpoint.retention import Pruner
from megagrow.checkpoint.save import Save
from megagrow.checkpoint.snapshot import Snapshot
from megagrow.config.schema import RunConfig
from megagrow.train.loop import StepDone
from megagrow.train.reporting.metrics import read_metrics
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.train_state import RunState
from tests.helpers.checkpoint.damage import flip
from tests.helpers.jobs import Hook, records, train, write_run
from tests.helpers.runs import STEP_TOKENS, make_run

pytestmark = pytest.mark.dist


def saving_run(folder: Path, background: bool) -> RunConfig:
    """Saved after every third of eight steps and at the end."""
    folder.mkdir()
    return make_run(
        folder,
        [{"tokens": 8 * STEP_TOKENS}],
        checkpoint={"interval": 3, "keep_last": 9, "background": background},
    )


def completed(run: RunConfig, hook: Hook | None = None) -> list[dict[str, Any]]:
    done = train(write_run(run.output_dir.with_suffix(".yaml"), run), 2, hook).finish()
    assert done.codes == [0, 0], done.err
    return read_metrics(run.output_dir / "metrics.jsonl")


def held_until(step: int) -> Hook:
    """Rank 1 does not write the first checkpoint before it has trained some more steps.

    No rank copies its state before the next update waits for the copy.
    """

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        write, record, reached = Save.write, RunLogger.step, threading.Event()
        copy, wait, waits = Snapshot.copy, Snapshot.wait, threading.Event()

        def late(self: Snapshot, tensors: Any) -> Any:
            if not waits.wait(timeout=30):
                raise OSError("the update did not wait for the copy")
            return copy(self, tensors)

        def waiting(self: Snapshot) -> None:
            if not self._copied.is_set():
                waits.set()
            wait(self)
            waits.clear()

        def held(self: Save, tensors: Any) -> Any:
            if rank == 1 and self.step == 3 and not reached.wait(timeout=30):
                raise OSError("the training did not go on")
            return write(self, tensors)

        def step_done(self: RunLogger, event: StepDone) -> None:
            record(self, event)
            if event.state.counters.step == step:
                reached.set()

        patch.setattr(Snapshot, "copy", late)
        patch.setattr(Snapshot, "wait", waiting)
        patch.setattr(Save, "write", held)
        patch.setattr(RunLogger, "step", step_done)

    return hook


def shards(run: RunConfig) -> dict[str, bytes]:
    """All files of tensors, to the bit."""
    folder = run.output_dir / "checkpoints"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def blocking(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same run, which waits for every save."""
    run = saving_run(tmp_path_factory.mktemp("blocking") / "run", background=False)
    order = [(r["kind"], r["step"]) for r in completed(run) if r["kind"] != "validation"]
    steps = [("train", step) for step in range(1, 9)]
    saves = [("checkpoint", step) for step in (3, 6, 8)]
    begin, end = [("start", 0)], [("end", 8)]
    assert (
        order
        == begin + steps[:3] + saves[:1] + steps[3:6] + saves[1:2] + steps[6:] + saves[2:] + end
    )
    return run


@pytest.mark.parametrize("step", [5, 6], ids=["done before the next save", "the next save waits"])
def test_the_training_goes_on_while_a_rank_writes(tmp_path, blocking, step):
    run = saving_run(tmp_path / "run", background=True)
    order = [(record["kind"], record["step"]) for record in completed(run, held_until(step))]
    at = order.index(("checkpoint", 3))
    assert order.index(("train", step)) < at < order.index(("train", 7))
    assert at < order.index(("checkpoint", 6)) < order.index(("end", 8))
    fields = ("step", "loss", "grad_norm", "lr")
    assert records(run, "train", fields) == records(blocking, "train", fields)
    assert shards(run) == shards(blocking) and len(shards(run)) == 6


def test_the_time_that_the_training_stood_still_is_recorded(tmp_path):
    run = saving_run(tmp_path / "run", background=True)
    log = completed(run, held_until(5))
    first, *_, last = (r for r in log if r["kind"] == "checkpoint")
    between = sum(r["seconds"] for r in log if r["kind"] == "train" and r["step"] in (4, 5))
    assert 0 < first["stall_seconds"] <= first["seconds"] - between
    assert last["stall_seconds"] == pytest.approx(last["seconds"], rel=0.2, abs=0.01)
    lost = log[-1]["lost_seconds"]
    stalls = [record["stall_seconds"] for record in log if record["kind"] == "checkpoint"]
    assert log[-1]["kind"] == "end" and lost == pytest.approx(sum(stalls))


def obstacles(run: RunConfig) -> Hook:
    """After the first save, old checkpoints appear that cannot be removed; step 3 is busy once."""
    folder, busy = run.output_dir / "checkpoints", []

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        record, rmtree = RunLogger.checkpoint, shutil.rmtree

        def saved(self: RunLogger, state: RunState, *args: Any) -> None:
            record(self, state, *args)
            if rank == 0 and state.counters.step == 3:
                (folder / "step-000000001").mkdir()
                (folder / "step-000000001" / "notes").touch()
                (folder / "step-000000002").symlink_to(run.output_dir.parent)

        def removing(path: Path, *args: Any, **options: Any) -> None:
            if "step-000000003" in str(path) and not busy:
                busy.append(path)
                raise OSError(errno.EBUSY, "Device or resource busy")
            rmtree(path, *args, **options)

        patch.setattr(RunLogger, "checkpoint", saved)
        patch.setattr(shutil, "rmtree", removing)

    return hook


def test_old_checkpoints_that_cannot_be_removed_end_no_run(tmp_path):
    real = tmp_path / "real"
    (real / "disk").mkdir(parents=True)
    (real / "checkpoints").symlink_to(real / "disk")
    (tmp_path / "run").symlink_to(real)
    run = make_run(
        tmp_path,
        [{"tokens": 8 * STEP_TOKENS}],
        checkpoint={"interval": 3, "keep_last": 1},
    )
    done = train(write_run(tmp_path / "run.yaml", run), 2, obstacles(run)).finish()
    assert done.codes == [0, 0], done.err
    warnings = [line for line in done.out[0].splitlines() if "cannot be removed" in line]
    assert ["step-000000001" in line for line in warnings] == [True, False]
    assert "step-000000003" in warnings[1]
    assert [step for (step,) in records(run, "checkpoint", ["step"])] == [3, 6, 8]
    names = sorted(path.name for path in (real / "disk").iterdir())
    assert names == ["step-000000001", "step-000000008"] and real.exists()
    assert {"config.yaml", "metrics.jsonl"} <= {path.name for path in real.iterdir()}


def test_a_checkpoint_that_was_damaged_meanwhile_does_not_count(tmp_path):
    """A bit of step 6 flips before the save of step 9, which then keeps step 3."""
    seen = tmp_path / "seen"
    listed = Pruner.due
    run = make_run(tmp_path, [{"tokens": 12 * STEP_TOKENS}], checkpoint={"interval": 3})
    folder = run.output_dir / "checkpoints"

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        def due(self: Pruner, step: int) -> list[Path]:
            with seen.open("a") as file:
                file.write(" ".join(str(step_of(p)) for p in list_checkpoints(folder)) + "\n")
            if step == 9:
                flip(folder / "step-000000006")
            return listed(self, step)

        patch.setattr(Pruner, "due", due)

    done = train(write_run(tmp_path / "run.yaml", run), 2, hook).finish()
    assert done.codes == [0, 0], done.err
    assert seen.read_text().splitlines() == ["", "3", "3 6", "3 6 9"]
    assert [step_of(path) for path in list_checkpoints(folder)] == [9, 12]
    (line,) = [line for line in done.out[0].splitlines() if "keep_last" in line]
    assert "step-000000006/rank-00001.safetensors: damaged, its checksum is " in line
    assert line.endswith("; the checkpoint does not count for keep_last")
