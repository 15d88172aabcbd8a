"""A run, from its config to its last checkpoint, in the order in which it happens."""

import time

import torch

from megagrow.checkpoint.load import load_storage, newest_checkpoint
from megagrow.checkpoint.manifest import Manifest, describe_layout
from megagrow.checkpoint.save import prune_checkpoints, save_checkpoint
from megagrow.config.checks import world_problems
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.parallel.topology import (
    Launch,
    init_process_group,
    leave_process_group,
    read_launch,
    together,
)
from megagrow.reshard.fill import fill_initial
from megagrow.train.environment import describe_environment
from megagrow.train.grow import grow
from megagrow.train.inputs import Inputs, open_inputs
from megagrow.train.loop import StageEnd, StepDone, Stopped, advance
from megagrow.train.recorder import Recorder
from megagrow.train.signals import StopSignal
from megagrow.train.stage import Stage, build_stage
from megagrow.train.state import RunState
from megagrow.train.step import mean_loss


def train(run: RunConfig) -> None:
    """Trains a run to its end, from its newest checkpoint if it has one. All ranks call this."""
    launch = read_launch()
    problems = world_problems(run, launch.world_size)
    if problems:
        raise InputError("; ".join(problems))
    device = init_process_group(launch)
    inputs = together(lambda: open_inputs(run))
    _train(run, launch, device, inputs)
    leave_process_group()


def _train(run: RunConfig, launch: Launch, device: torch.device, inputs: Inputs) -> None:
    with Recorder(run, launch.rank, launch.world_size) as recorder, StopSignal() as stop:
        together(recorder.open)
        stage, state = _begin(run, device, recorder)
        saved = state.counters.step
        while True:
            event = advance(run, stage, state, inputs.train, stop, recorder.check)
            state = event.state
            match event:
                case StepDone():
                    recorder.step(event)
                    if event.validate:
                        _validate(stage, state, inputs, recorder)
                    if event.save:
                        state = _save(run, stage, state, recorder, launch)
                        saved = state.counters.step
                case StageEnd() if stage.index + 1 < len(run.stages):
                    stage, state = _grow(run, stage, state, inputs, recorder)
                case StageEnd() | Stopped():
                    break
        if saved < state.counters.step:
            state = _save(run, stage, state, recorder, launch)
        recorder.end(state, event.reason if isinstance(event, Stopped) else None)
        together(recorder.check)


def _begin(run: RunConfig, device: torch.device, recorder: Recorder) -> tuple[Stage, RunState]:
    """The state of the newest whole checkpoint, or initial weights."""
    found = newest_checkpoint(run.output_dir / "checkpoints", recorder.say)
    if found is None:
        stage, state = build_stage(run, 0, device), RunState()
        fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
        stage.engine.ready(adam_step=0)
        recorder.start(state, None)
        return stage, state
    path, manifest = found
    state = RunState.from_json(manifest.run)
    _check_same_model(run, state, manifest)
    stage = build_stage(run, state.stage, device)
    load_storage(path, manifest, stage.layout, stage.engine.storage())
    stage.engine.ready(manifest.adam_step)
    recorder.start(state, path)
    return stage, state


def _check_same_model(run: RunConfig, state: RunState, manifest: Manifest) -> None:
    where = f"{run.output_dir / 'checkpoints'}: its newest checkpoint"
    if state.stage >= len(run.stages):
        raise InputError(f"{where} is of stage {state.stage}, the run has {len(run.stages)} stages")
    model = run.stages[state.stage].model.model_dump()
    for key, value in manifest.model.items():
        if model.get(key) != value:
            raise InputError(
                f"{where} is of another model: {key} is {value}, stage {state.stage} of the run "
                f"says {model.get(key)}; set another output_dir or the same model"
            )


def _validate(stage: Stage, state: RunState, inputs: Inputs, recorder: Recorder) -> None:
    if inputs.validation is not None:
        loss = mean_loss(stage, inputs.validation, inputs.validation_sequences)
        recorder.validation(state, loss)


def _save(
    run: RunConfig, stage: Stage, state: RunState, recorder: Recorder, launch: Launch
) -> RunState:
    begin = time.perf_counter()
    directory = run.output_dir / "checkpoints"
    environment = describe_environment() | {"config": run.model_dump(mode="json")}
    path = save_checkpoint(
        directory,
        state.counters.step,
        stage.layout,
        stage.engine.storage(),
        lambda files: Manifest(
            stage.config.model.model_dump(),
            describe_layout(stage.layout),
            stage.engine.adam_step,
            state.as_json(),
            environment,
            files,
        ),
    )
    together(lambda: prune_checkpoints(directory, run.checkpoint.keep_last)
             if launch.rank == 0 else None)  # fmt: skip
    seconds = time.perf_counter() - begin
    recorder.checkpoint(state, path, seconds)
    return state.after_loss(seconds)


def _grow(
    run: RunConfig, stage: Stage, state: RunState, inputs: Inputs, recorder: Recorder
) -> tuple[Stage, RunState]:
    sequences = stage.config.batch.global_batch_size
    before = mean_loss(stage, inputs.fixed, sequences)
    stage, report = grow(run, stage)
    after = mean_loss(stage, inputs.fixed, sequences)
    state = state.after_growth(report.layers).after_loss(report.seconds)
    recorder.growth(state, report, before, after)
    return stage, state
