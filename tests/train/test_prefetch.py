"""Training steps with prefetched batches: concurrency, equal bits, errors, time, host waits."""

import threading
from collections import Counter
from pathlib import Path
from traceback import extract_stack
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode

import megagrow.train.loop
from megagrow.config.schema import RunConfig
from megagrow.data.batches import BatchReader
from megagrow.errors import InputError
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage
from megagrow.train.step_feed import StepFeed, StepPart
from megagrow.train.train_state import RunState
from tests.helpers.runs import STEP_TOKENS, make_run
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

STEPS = 4
PATIENCE = 60.0


class SerialFeed(StepFeed):
    """A feed that reads each step when it is due, in the thread of the caller."""

    def prefetch(self, part: StepPart) -> None:
        pass

    def read(self, part: StepPart) -> list[Any]:
        return part.read(self._reader)


def built(run: RunConfig) -> Stage:
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    return stage


def trained(run: RunConfig, kind: type[StepFeed]) -> list[Any]:
    """Loss, norm, seconds and position of each step; or the error that ends them."""
    stage, out, state = built(run), [], RunState()
    with kind(open_inputs(run).train) as feed:
        try:
            for _ in range(STEPS):
                event = advance(run, stage, state, feed, StopSignal())
                assert isinstance(event, StepDone)
                state, measure = event.state, event.measure
                out.append((measure.loss, measure.grad_norm, measure.position, measure.seconds))
        except InputError as error:
            out.append((type(error).__name__, str(error)))
    stage.release()
    return out


def together(run: RunConfig) -> list[Any]:
    """The read of each step ends within the step before it; either waits for the other."""
    read, train_step = BatchReader.read, megagrow.train.loop.train_step
    begun = [threading.Event() for _ in range(STEPS + 1)]
    done = [threading.Event() for _ in range(STEPS + 2)]
    steps: list[None] = []

    def reading(self: BatchReader, position: int, indices: Any) -> Any:
        step = position // STEP_TOKENS
        assert step == 0 or begun[step - 1].wait(PATIENCE), "not read while the step before runs"
        batch = read(self, position, indices)
        done[step].set()
        return batch

    def training(*arguments: Any) -> Any:
        step = len(steps)
        steps.append(None)
        begun[step].set()
        assert done[step + 1].wait(PATIENCE), "the next step is not read meanwhile"
        return train_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchReader, "read", reading)
        patch.setattr(megagrow.train.loop, "train_step", training)
        ahead = trained(run, StepFeed)
    return [ahead, trained(run, SerialFeed)]


def test_the_next_step_is_read_during_a_step_and_the_bits_are_the_same(tmp_path):
    run = make_run(tmp_path, [{"tokens": 640}], precision="bf16")
    for ahead, serial in run_ranks(2, together, run):
        assert [row[:3] for row in ahead] == [row[:3] for row in serial]
        assert len(ahead) == STEPS


class HostReads(TorchFunctionMode):
    """Counts reads of tensors by the host, by the function that reads: each waits for a GPU."""

    NAMES = frozenset(
        ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if getattr(function, "__name__", "") in self.NAMES:
            ours = [frame for frame in extract_stack() if "/megagrow/" in frame.filename]
            self.seen[f"{Path(ours[-1].filename).name} {ours[-1].name}"] += 1
        return function(*args, **(kwargs or {}))


def host_reads(run: RunConfig) -> Counter[str]:
    """The reads of the last step, and the waits for all work of the device."""
    stage, stop, state = built(run), StopSignal(), RunState()
    accelerator = get_accelerator()
    with StepFeed(open_inputs(run).train) as feed:
        for _ in range(STEPS):
            with pytest.MonkeyPatch.context() as patch, HostReads() as reads:
                wait = lambda *_: reads.seen.update(["synchronize"])  # noqa: E731
                patch.setattr(accelerator, "synchronize", wait)
                event = advance(run, stage, state, feed, stop)
            state = event.state
    return reads.seen


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_waits_for_the_device_once(tmp_path, zero):
    options: dict[str, Any] = {"guards": {"loss_spike": {"window": 2}}, "precision": "bf16"}
    run = make_run(tmp_path, [{"tokens": 640, "parallel": {"zero_stage": zero}}], **options)
    expected = {"agreement.py share_values_and_flags": 1}
    if zero == 3:
        expected["engine.py step"] = 1  # DeepSpeed reads the norm before it clips
    for seen in run_ranks(2, host_reads, run):
        assert seen == expected


def failing(run: RunConfig) -> list[Any]:
    """The file system fails for rank 1 in the third step; a read takes 100 s of a false clock."""
    read, clock = BatchReader.read, [0.0]

    def reading(self: BatchReader, position: int, indices: Any) -> Any:
        clock[0] += 100.0
        if torch.distributed.get_rank() == 1 and position == 2 * STEP_TOKENS:
            raise OSError("stale file handle")
        return read(self, position, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchReader, "read", reading)
        patch.setattr(megagrow.train.loop.time, "perf_counter", lambda: clock[0])
        return trained(run, StepFeed)


def test_an_error_of_one_rank_ends_all_in_its_step_and_waiting_counts_as_time(tmp_path):
    run = make_run(tmp_path, [{"tokens": 640}])
    for rank, (first, second, error) in enumerate(run_ranks(2, failing, run)):
        assert error == ("ResourceError", "rank 1: stale file handle")
        # Two micro-batches of a step: the first step waits for itself and for the next one.
        assert (first[3], second[3]) == (400.0, 200.0 if rank == 0 else 100.0)
