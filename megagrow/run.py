"""A run, from its config to its last checkpoint, in the order in which it happens."""

import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megagrow.checkpoint.load import load_storage, newest_checkpoint
from megagrow.checkpoint.manifest import Manifest
from megagrow.config.checks import world_problems
from megagrow.config.schema import ModelConfig, RunConfig
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
from megagrow.train.beginning import fill_beginning, open_beginning
from megagrow.train.candidates import grow_best
from megagrow.train.compare import Change, change, predictions
from megagrow.train.environment import describe_environment
from megagrow.train.feed import Feed
from megagrow.train.grow import end_stage
from megagrow.train.growths import as_grown
from megagrow.train.inputs import Inputs, open_inputs
from megagrow.train.loop import StageEnd, StepDone, Stopped, advance
from megagrow.train.recorder import Recorder
from megagrow.train.saving import Saving
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
    saving: Saving


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
        saving = Saving(run, launch.rank, device, environment, recorder)
        with saving:
            _train(Job(run, launch, device, inputs, recorder, saving))
        together(recorder.check)
    leave_process_group()


def _train(job: Job) -> None:
    recorder = job.recorder
    for warning in timing_warnings(job.run):
        recorder.say(f"warning: {warning}")
    job, stage, state = _begin(job)
    saving, saved = job.saving, state.counters.step
    saving.prepare(stage)
    with StopSignal() as stop:
        while True:
            event = advance(job.run, stage, state, job.inputs.train, stop, recorder.check, saving)
            state = saving.account(event.state)
            match event:
                case StepDone():
                    recorder.step(event)
                    if event.validate:
                        _validate(job, stage, state)
                    if event.save:
                        state = saving.save(stage, state)
                        saved = state.counters.step
                case StageEnd() if stage.index + 1 < len(job.run.stages):
                    saving.release()
                    job, stage, state = _grow(job, stage, state)
                    saving.prepare(stage)
                case StageEnd() | Stopped():
                    break
        state = saving.finish(state)
        if saved < state.counters.step:
            state = saving.save(stage, state, wait=True)
        recorder.end(state, event.reason if isinstance(event, Stopped) else None)
    stage.release()


def _begin(job: Job) -> tuple[Job, Stage, RunState]:
    """The state of the newest whole checkpoint, or the weights that the run begins with."""
    found = newest_checkpoint(job.saving.directory, job.recorder.say)
    path, manifest = found or (None, None)
    state = RunState() if manifest is None else RunState.from_json(manifest.run)
    if manifest is not None:
        _check_same_model(job, state, manifest)
        job = replace(job, run=as_grown(job.run, state))
    first = open_beginning(job.run, job.recorder.say) if manifest is None else None
    stage = build_stage(job.run, state.stage, job.device)
    storage = stage.engine.storage()
    if path is None or manifest is None:
        adam_step = fill_beginning(first, stage.layout, job.launch.rank, storage, job.run.seed)
    else:
        load_storage(path, manifest, stage.layout, storage)
        adam_step = manifest.adam_step
    stage.engine.ready(adam_step)
    job.recorder.start(state, path)
    return job, stage, state


def _check_same_model(job: Job, state: RunState, manifest: Manifest) -> None:
    where, stages = f"{job.saving.directory}: its newest checkpoint", job.run.stages
    if state.stage >= len(stages):
        raise InputError(f"{where} is of stage {state.stage}, the run has {len(stages)} stages")
    model = stages[state.stage].model.model_dump()
    for key, value in ModelConfig(**manifest.model).model_dump().items():
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


def _grow(job: Job, stage: Stage, state: RunState) -> tuple[Job, Stage, RunState]:
    fixed = job.inputs.fixed

    def loss_of(run: RunConfig, stage: Stage, steps: int) -> float:
        sequences = run.stages[state.stage].batch.global_batch_size
        return mean_loss(stage, fixed, sequences, masks_now(run, stage, steps))

    begin = time.perf_counter()
    losses = [loss_of(job.run, stage, state.stage_step)]
    before = predictions(stage, fixed, masks_now(job.run, stage, state.stage_step))
    feed = Feed(job.inputs.train, state.counters.tokens, job.run.data.sequence_length)
    run, stage, report, probing = grow_best(
        job.run, end_stage(stage), feed, loss_of, job.recorder.say
    )
    losses.append(loss_of(run, stage, 0))
    difference = change(before, predictions(stage, fixed, masks_now(run, stage, 0)))
    spent = report.spent.plus(probing)
    state = state.after_growth(
        report.layers,
        report.operator,
        tokens=spent.tokens,
        flops=spent.flops,
        flops_true=spent.flops_true,
    ).after_loss(time.perf_counter() - begin)
    job.recorder.growth(state, report, losses[0], losses[1], difference)
    if report.preserves_function:
        _check_preserved(replace(job, run=run), stage, state, losses, difference)
    return replace(job, run=run), stage, state


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
