"""A run, from its config to its last checkpoint, in the order in which it happens."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagrow.checkpoint.load import load_storage, newest_checkpoint
from megagrow.checkpoint.manifest import Manifest, describe_layout
from megagrow.checkpoint.save import prune_checkpoints, save_checkpoint
from megagrow.config.checks import world_problems
from megagrow.config.schema import RunConfig
from megagrow.config.timing import timing_warnings
from megagrow.errors import InputError
from megagrow.growth.problems import growth_problems
from megagrow.parallel.topology import (
    Launch,
    init_process_group,
    leave_process_group,
    read_launch,
    together,
)
from megagrow.reshard.fill import fill_initial
from megagrow.train.compare import Change, change, predictions
from megagrow.train.environment import describe_environment
from megagrow.train.grow import grow
from megagrow.train.inputs import Inputs, open_inputs
from megagrow.train.learn import Feed
from megagrow.train.loop import StageEnd, StepDone, Stopped, advance
from megagrow.train.recorder import Recorder
from megagrow.train.signals import StopSignal
from megagrow.train.stage import Stage, build_stage, masks_now
from megagrow.train.state import RunState
from megagrow.train.step import mean_loss


@dataclass(frozen=True)
class Job:
    """What stays the same while a run is trained."""

    run: RunConfig
    launch: Launch
    device: torch.device
    inputs: Inputs
    recorder: Recorder
    environment: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.run.output_dir / "checkpoints"


def train(run: RunConfig) -> None:
    """Trains a run to its end, from its newest checkpoint if it has one. All ranks call this."""
    launch = read_launch()
    problems = growth_problems(run) or world_problems(run, launch.world_size)
    if problems:
        raise InputError("; ".join(problems))
    device = init_process_group(launch)
    inputs = together(lambda: open_inputs(run))
    environment = describe_environment(run)
    with Recorder(run, launch.rank, launch.world_size, environment) as recorder:
        together(recorder.open)
        _train(Job(run, launch, device, inputs, recorder, environment))
        together(recorder.check)
    leave_process_group()


def _train(job: Job) -> None:
    run, recorder = job.run, job.recorder
    for warning in timing_warnings(run):
        recorder.say(f"warning: {warning}")
    stage, state = _begin(job)
    saved = state.counters.step
    with StopSignal() as stop:
        while True:
            event = advance(run, stage, state, job.inputs.train, stop, recorder.check)
            state = event.state
            match event:
                case StepDone():
                    recorder.step(event)
                    if event.validate:
                        _validate(job, stage, state)
                    if event.save:
                        state = _save(job, stage, state)
                        saved = state.counters.step
                case StageEnd() if stage.index + 1 < len(run.stages):
                    stage, state = _grow(job, stage, state)
                case StageEnd() | Stopped():
                    break
        if saved < state.counters.step:
            state = _save(job, stage, state)
        recorder.end(state, event.reason if isinstance(event, Stopped) else None)


def _begin(job: Job) -> tuple[Stage, RunState]:
    """The state of the newest whole checkpoint, or initial weights."""
    found = newest_checkpoint(job.checkpoints, job.recorder.say)
    path, manifest = found or (None, None)
    state = RunState() if manifest is None else RunState.from_json(manifest.run)
    if manifest is not None:
        _check_same_model(job, state, manifest)
    stage = build_stage(job.run, state.stage, job.device)
    if path is None or manifest is None:
        fill_initial(stage.layout, job.launch.rank, stage.engine.storage(), job.run.seed)
        stage.engine.ready(adam_step=0)
    else:
        load_storage(path, manifest, stage.layout, stage.engine.storage())
        stage.engine.ready(manifest.adam_step)
    job.recorder.start(state, path)
    return stage, state


def _check_same_model(job: Job, state: RunState, manifest: Manifest) -> None:
    where, stages = f"{job.checkpoints}: its newest checkpoint", job.run.stages
    if state.stage >= len(stages):
        raise InputError(f"{where} is of stage {state.stage}, the run has {len(stages)} stages")
    model = stages[state.stage].model.model_dump()
    for key, value in manifest.model.items():
        if model.get(key) != value:
            raise InputError(
                f"{where} is of another model: {key} is {value}, stage {state.stage} of the run "
                f"says {model.get(key)}; set another output_dir or the same model"
            )


def _validate(job: Job, stage: Stage, state: RunState) -> None:
    if job.inputs.validation is not None:
        masks = masks_now(job.run, stage, state.stage_step)
        loss = mean_loss(stage, job.inputs.validation, job.inputs.validation_sequences, masks)
        job.recorder.validation(state, loss)


def _save(job: Job, stage: Stage, state: RunState) -> RunState:
    begin = time.perf_counter()
    path = save_checkpoint(
        job.checkpoints,
        state.counters.step,
        stage.layout,
        stage.engine.storage(),
        lambda files: Manifest(
            stage.config.model.model_dump(),
            describe_layout(stage.layout),
            stage.engine.adam_step,
            state.as_json(),
            job.environment,
            files,
        ),
    )
    keep = job.run.checkpoint.keep_last
    together(lambda: prune_checkpoints(job.checkpoints, keep) if job.launch.rank == 0 else None)
    seconds = time.perf_counter() - begin
    job.recorder.checkpoint(state, path, seconds)
    return state.after_loss(seconds)


def _grow(job: Job, stage: Stage, state: RunState) -> tuple[Stage, RunState]:
    sequences = stage.config.batch.global_batch_size
    masks = masks_now(job.run, stage, state.stage_step)
    losses = [mean_loss(stage, job.inputs.fixed, sequences, masks)]
    before = predictions(stage, job.inputs.fixed, masks)
    stage, report = grow(job.run, stage, Feed(job.inputs.train, state.counters.tokens))
    masks = masks_now(job.run, stage, stage_step=0)
    losses.append(mean_loss(stage, job.inputs.fixed, sequences, masks))
    difference = change(before, predictions(stage, job.inputs.fixed, masks))
    state = state.after_growth(
        report.layers,
        tokens=report.tokens_used,
        flops=report.flops_used,
        flops_true=report.flops_true_used,
    ).after_loss(report.seconds)
    job.recorder.growth(state, report, losses[0], losses[1], difference)
    if report.preserves_function:
        _check_preserved(job, stage, state, losses, difference)
    return stage, state


def _check_preserved(
    job: Job, stage: Stage, state: RunState, losses: list[float], difference: Change
) -> None:
    """An exact growth that is not exact stops the run before a step is taken."""
    growth = job.run.stages[state.stage].growth
    assert growth is not None
    moved = max(abs(losses[1] - losses[0]), difference.kl)
    wrong = torch.tensor([float(not moved <= growth.tolerance)], device=stage.topology.device)
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    if wrong.item():
        raise InputError(
            f"the growth at step {state.counters.step} by {' with '.join(growth.operator)} should "
            f"have kept the function, but the loss on a fixed batch went from {losses[0]:.6f} to "
            f"{losses[1]:.6f} (KL {difference.kl:.2e}), more than growth.tolerance = "
            f"{growth.tolerance}; no step was taken and the checkpoint before it is intact: raise "
            "the tolerance if the precision explains it, else report a bug"
        )
