"""Run of one simulated rank: build, train, validate, save and grow each stage of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from megagrow.checkpoint import load
from megagrow.checkpoint.discovery import shard_name
from megagrow.checkpoint.load import load_storage
from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.shards import own_tensors
from megagrow.checkpoint.snapshot import Snapshot
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.data.batches import Batch, BatchReader
from megagrow.parallel.launch import Launch, export_launch
from megagrow.reshard.layout import Layout
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
from megagrow.train.state_check import non_finite, predictions
from megagrow.train.step import mean_loss
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState


@dataclass(frozen=True)
class Actions:
    """Parts of a run that are simulated in addition to the steps."""

    load: bool = False
    validation: bool = False
    save: bool = False
    growth: bool = False
    micro_batches: int = 2
    """Micro-batches per step, at most; later ones repeat the second."""


TRAINING = Actions()
EVERYTHING = Actions(load=True, validation=True, save=True, growth=True)


def simulate_rank(
    run: RunConfig, world_size: int, rank: int = 0, actions: Actions = TRAINING
) -> tuple[StageReport, ...]:
    """Simulate a rank of a run on `world_size` ranks; one report per stage.

    Without `actions.growth` each stage is built from nothing. Call it in a process of its own
    (`isolated`): the device type of torch cannot be removed.
    """
    recorder = Recorder()
    device = register(recorder.usage, recorder.wait)
    export_launch(Launch(rank, world_size, 0))
    dist.init_process_group(
        f"cpu:fake,{device.type}:fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    run = shortened(run, world_size, actions.micro_batches)
    with patched(recorder), FakeTensorMode(allow_non_fake_inputs=True), recorder:
        return tuple(_simulate_stages(run, device, recorder, actions))


def _simulate_stages(
    run: RunConfig, device: torch.device, recorder: Recorder, actions: Actions
) -> Iterator[StageReport]:
    stage: Stage | None = None
    for index in range(len(run.stages)):
        if stage is not None and actions.growth:
            recorder.begin("growth")
            with StepFeed(_Reader(run)) as steps:
                feed = Feed(steps, 0, run.data.sequence_length)
                stage, _ = grow(run, end_stage(stage), feed)
        else:
            stage = None  # releases the stage before
            recorder.begin("build")
            stage = build_stage(run, index, device)
            if actions.load:
                recorder.begin("load")
                _load(stage)
            stage.engine.ready(0)
        yield _simulate_stage(run, stage, recorder, actions)
        if not actions.growth:
            stage.release()


def _simulate_stage(
    run: RunConfig, stage: Stage, recorder: Recorder, actions: Actions
) -> StageReport:
    label_state(recorder.memory, stage.engine)
    reader, state = _Reader(run), RunState(stage=stage.index)
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
    if actions.save:
        recorder.begin("save")
        non_finite(stage)
        own = own_tensors(stage.layout, stage.engine.storage(), stage.topology.rank)
        snapshot = Snapshot(stage.topology.device)
        snapshot.begin()
        snapshot.copy(own)
    return recorder.report(stage.topology)


def _load(stage: Stage) -> None:
    """Fill the state from a checkpoint of zeros in the stage's own layout."""
    layout = stage.layout
    files = {
        shard_name(rank): partial(_ZeroFile, layout, rank) for rank in range(layout.dp * layout.tp)
    }
    manifest = cast(Manifest, SimpleNamespace(read_layout=lambda: layout))
    with patch.object(load, "safe_open", lambda path, framework: files[path.name]()):
        load_storage(Path(), manifest, layout, stage.engine.storage())
    stage.engine.ready(0)


class _ZeroFile:
    """Shard file of a rank, as safetensors opens it, with zeros."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_slice(self, name: str) -> Any:
        held = len(self._layout.interval(name.rpartition(".")[0], self._rank // self._layout.tp))
        return _ZeroSlice(held)


class _ZeroSlice:
    def __init__(self, size: int) -> None:
        self._size = size

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        return [self._size]

    def __getitem__(self, part: slice) -> Tensor:
        return torch.zeros(part.stop - part.start)


class _Reader(BatchReader):
    """Batches of zeros with two documents per sequence."""

    def __init__(self, run: RunConfig) -> None:
        self.length = run.data.sequence_length
        self._packed = run.data.reset_attention_mask

    def read(self, position: int, sequence_indices: Sequence[int]) -> Batch:
        with _disable_current_modes():  # host memory is real: sizes may depend on its values
            shape = (len(sequence_indices), self.length)
            zeros = torch.zeros(shape, dtype=torch.int64)
            documents = (torch.arange(self.length) >= self.length // 2).long().expand(shape)
            return Batch(zeros, zeros.clone(), zeros.clone(), documents if self._packed else None)


def shortened(run: RunConfig, world_size: int, micro_batches: int) -> RunConfig:
    """Return the run with at most this many micro-batches per step."""
    return run.model_copy(
        update={"stages": tuple(_short(each, world_size, micro_batches) for each in run.stages)}
    )


def _short(stage: StageConfig, world_size: int, micro_batches: int) -> StageConfig:
    per_pass = stage.batch.micro_batch_size * (
        world_size // stage.parallel.tensor_model_parallel_size
    )
    size = min(stage.batch.global_batch_size, micro_batches * per_pass)
    batch = stage.batch.model_copy(update={"global_batch_size": size})
    return stage.model_copy(update={"batch": batch})
