"""Run of one simulated rank: build, train, evaluate, save and grow each stage of a run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from megagrow.config.schema import RunConfig, StageConfig
from megagrow.data.batches import Batch, BatchReader
from megagrow.data.stage_streams import StreamPlace
from megagrow.evaluation.stage_model import StageModel
from megagrow.parallel.launch import Launch, export_launch
from megagrow.simulation.actions import evaluate, load, save
from megagrow.simulation.categories import label_state, phases
from megagrow.simulation.device import register
from megagrow.simulation.patches import patched
from megagrow.simulation.recorder import Recorder
from megagrow.simulation.report import STEP, StageReport
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.growth_event.cost import Feed
from megagrow.train.growth_event.event import end_stage, grow
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage, masks_now
from megagrow.train.state_check import predictions
from megagrow.train.step import mean_loss
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState


@dataclass(frozen=True)
class Actions:
    """Parts of a run that are simulated in addition to the steps."""

    load: bool = False
    validation: bool = False
    evaluation: bool = False
    save: bool = False
    growth: bool = False
    micro_batches: int = 2
    """Micro-batches per step and pipeline rank, at most; later ones repeat the second. With 2 a
    pipeline has as many in flight as with more."""


TRAINING = Actions()
EVERYTHING = Actions(load=True, validation=True, evaluation=True, save=True, growth=True)


def simulate_rank(
    run: RunConfig, world_size: int, rank: int = 0, actions: Actions = TRAINING
) -> tuple[StageReport, ...]:
    """Simulate a rank of a run on `world_size` ranks; one report per stage.

    Without `actions.growth` each stage is built from nothing. Call it in a process of its own
    (`isolated`): the device type of torch cannot be removed.
    """
    run = shortened(run, world_size, actions.micro_batches)
    with simulated_device(world_size, rank) as (device, recorder):
        return tuple(_simulate_stages(run, device, recorder, actions))


@contextmanager
def simulated_device(world_size: int, rank: int) -> Iterator[tuple[torch.device, Recorder]]:
    """Context in which this process is a rank with a simulated device; once per process."""
    recorder = Recorder()
    device = register(recorder.usage, recorder.wait)
    export_launch(Launch(rank, world_size, 0))
    dist.init_process_group(
        f"cpu:fake,{device.type}:fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    with patched(recorder), FakeTensorMode(allow_non_fake_inputs=True), recorder:
        yield device, recorder


def _simulate_stages(
    run: RunConfig, device: torch.device, recorder: Recorder, actions: Actions
) -> Iterator[StageReport]:
    stage: Stage | None = None
    for index in range(len(run.stages)):
        if stage is not None and actions.growth:
            recorder.begin("growth")
            with StepFeed(_Reader(run.stages[index])) as steps:
                feed = Feed(steps, StreamPlace(0))
                stage, _ = grow(run, end_stage(stage), feed)
        else:
            stage = None  # releases the stage before
            recorder.begin("build")
            stage = build_stage(run, index, device)
            if actions.load:
                recorder.begin("load")
                load(stage)
            stage.engine.ready(0)
        yield _simulate_stage(run, stage, recorder, actions)
        if not actions.growth:
            stage.release()


def _simulate_stage(
    run: RunConfig, stage: Stage, recorder: Recorder, actions: Actions
) -> StageReport:
    label_state(recorder.memory, stage.engine)
    reader, state = _Reader(stage.config), RunState(stage=stage.index)
    with StepFeed(reader) as feed, phases(recorder.memory, stage.engine):
        for section in ("first step", STEP):
            recorder.begin(section)
            event = advance(run, stage, state, feed, StopSignal())
            assert isinstance(event, StepDone)
            state = event.state if event.state.stage_tokens < stage.config.tokens else state
    masks = masks_now(run, stage, 0)
    if actions.validation:
        recorder.begin("validation")
        mean_loss(stage, reader, stage.config.batch.global_batch_size, masks)
        predictions(stage, reader, masks)
    if actions.evaluation:
        with stage.evaluating():
            evaluate(StageModel(stage, masks), stage.topology, recorder)
    if actions.save:
        recorder.begin("save")
        save(stage)
    return recorder.report(stage.topology)


class _Reader(BatchReader):
    """Batches of zeros with two documents per sequence."""

    def __init__(self, stage: StageConfig) -> None:
        self.length = stage.data.sequence_length
        self._packed = stage.data.reset_attention_mask

    def read(self, position: object, sequence_indices: Sequence[int]) -> Batch:
        with _disable_current_modes():  # host memory is real: sizes may depend on its values
            shape = (len(sequence_indices), self.length)
            zeros = torch.zeros(shape, dtype=torch.int64)
            documents = (torch.arange(self.length) >= self.length // 2).long().expand(shape)
            return Batch(zeros, zeros.clone(), zeros.clone(), documents if self._packed else None)


def shortened(run: RunConfig, world_size: int, micro_batches: int) -> RunConfig:
    """Return the run with at most this many micro-batches per step and pipeline rank."""
    return run.model_copy(
        update={"stages": tuple(_short(each, world_size, micro_batches) for each in run.stages)}
    )


def _short(stage: StageConfig, world_size: int, micro_batches: int) -> StageConfig:
    parallel = stage.parallel
    per_pass = stage.batch.micro_batch_size * parallel.data_parallel_size(world_size)
    most = micro_batches * parallel.pipeline_model_parallel_size
    size = min(stage.batch.global_batch_size, most * per_pass)
    batch = stage.batch.model_copy(update={"global_batch_size": size})
    return stage.model_copy(update={"batch": batch})
