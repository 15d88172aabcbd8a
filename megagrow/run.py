"""A run, from its config to its last checkpoint, in the order in which it happens."""

import time
from dataclasses import dataclass, replace
from functools import partial

import torch

from megagrow.checkpoint.load import newest_checkpoint
from megagrow.config.growth_guidelines import timing_warnings
from megagrow.config.schema import RunConfig
from megagrow.config.validation import world_problems
from megagrow.errors import ConfigError
from megagrow.evaluation.evaluator import Evaluation, open_evaluation
from megagrow.evaluation.results_store import remove_stored_after
from megagrow.growth.validation import growth_problems
from megagrow.parallel.agreement import any_across_ranks, run_on_all_ranks
from megagrow.parallel.launch import Launch, first_host, read_launch
from megagrow.parallel.process_groups import init_process_group, leave_process_group
from megagrow.train.checkpointer import Checkpointer
from megagrow.train.data_setup import Inputs, open_inputs
from megagrow.train.fault_tolerance.run_lock import lock_directory
from megagrow.train.fault_tolerance.signals import StopRequested, StopSignal
from megagrow.train.fault_tolerance.watchdog import Watchdog, start_watchdog
from megagrow.train.growth_event.cost import Feed
from megagrow.train.growth_event.event import end_stage
from megagrow.train.growth_event.function_check import Change, change, predictions
from megagrow.train.growth_event.operator_search import grow_best
from megagrow.train.kernel_warmup import WarmUp, check_kernels
from megagrow.train.loop import StageEnd, StepDone, Stopped, advance
from megagrow.train.reporting.environment import describe_environment
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.resume import begin, rewind_target
from megagrow.train.stage import Stage, masks_now
from megagrow.train.step import mean_loss
from megagrow.train.train_state import RunState


@dataclass(frozen=True)
class Job:
    """What stays the same while a run is trained."""

    run: RunConfig
    launch: Launch
    device: torch.device
    inputs: Inputs
    evaluation: Evaluation | None
    recorder: RunLogger
    saving: Checkpointer
    watchdog: Watchdog
    stop: StopSignal
    warm_up: WarmUp


def train(run: RunConfig) -> str | None:
    """Trains a run to its end, from its newest checkpoint if it has one. All ranks call this.

    Returns the signal that has stopped it before its end, None where there was none.
    """
    launch = read_launch()
    problems = growth_problems(run) or world_problems(run, launch.world_size)
    if problems:
        raise ConfigError("; ".join(problems))
    device = init_process_group(launch)
    run_on_all_ranks(lambda: check_kernels(run, device))
    inputs = run_on_all_ranks(lambda: open_inputs(run))
    evaluation = open_evaluation(run, device)
    environment = describe_environment(run)
    recorder = RunLogger(run, launch.rank, launch.world_size, environment)
    lock = run_on_all_ranks(lambda: lock_directory(run.output_dir, launch.rank, recorder.say))
    watchdog = start_watchdog(launch, first_host(), run.guards.hang_timeout)
    warm_up = WarmUp(device, launch.local_rank, recorder.say)
    with lock, recorder, watchdog, warm_up, StopSignal() as stop:
        run_on_all_ranks(recorder.open)
        saving = Checkpointer(run, launch.rank, device, environment, recorder)
        try:
            with saving:
                stopped = _train(
                    Job(
                        *(run, launch, device, inputs, evaluation),
                        *(recorder, saving, watchdog, stop, warm_up),
                    )
                )
        except RuntimeError:  # as torch.distributed raises, whatever the backend
            watchdog.raise_if_peer_lost()
            raise
        run_on_all_ranks(recorder.check)
        watchdog.beat("leaving", long=True)
        leave_process_group()
    return stopped


def _train(job: Job) -> str | None:
    recorder, given = job.recorder, job
    for warning in timing_warnings(job.run):
        recorder.say(f"warning: {warning}")
    job, stage, state = _begin(job)
    saving, saved, warm = job.saving, state.counters.step, None
    _prepare(job, stage)
    try:
        while True:
            # The first step on an engine may have to compile kernels.
            beat = partial(job.watchdog.beat, long=stage is not warm)
            check, reader = recorder.check, job.inputs.train
            event = advance(job.run, stage, state, reader, job.stop, check, beat, saving)
            state, warm = saving.account(event.state), stage
            match event:
                case StepDone():
                    recorder.step(event)
                    if event.rewind is not None:
                        job, stage, state = _rewind(given, stage, state, event.rewind)
                        saved = state.counters.step
                        continue
                    if event.validate:
                        _validate(job, stage, state)
                    if event.evaluate:
                        _evaluate(job, stage, state)
                    if event.save:
                        state = _save(job, stage, state)
                        saved = state.counters.step
                case StageEnd() if stage.index + 1 < len(job.run.stages):
                    saving.release()
                    job, stage, state = _grow(job, stage, state)
                    _prepare(job, stage)
                case StageEnd() | Stopped():
                    break
    except StopRequested as request:  # the checkpoint before the growth is all that counts
        recorder.end(state, str(request))
        return str(request)
    job.watchdog.beat("waiting for a save", long=True)
    state = saving.finish(state)
    if saved < state.counters.step:
        state = _save(job, stage, state, wait=True)
    stopped = event.reason if isinstance(event, Stopped) else None
    recorder.end(state, stopped)
    stage.release()
    return stopped


def _begin(job: Job) -> tuple[Job, Stage, RunState]:
    """The state of the newest whole checkpoint, or the weights that the run begins with."""
    job.watchdog.beat("the beginning of the run", long=True)
    found = newest_checkpoint(job.saving.directory, job.recorder.say)
    run, stage, state = begin(job.run, found, job.device, job.recorder.say)
    job.recorder.start(state, None if found is None else found[0])
    _forget_evaluations(job, -1 if found is None else state.counters.step)
    return replace(job, run=run), stage, state


def _prepare(job: Job, stage: Stage) -> None:
    """What goes on beside the training of a stage."""
    job.saving.prepare(stage)
    job.warm_up.prepare(job.run, stage.index)


def _rewind(job: Job, stage: Stage, failed: RunState, reason: str) -> tuple[Job, Stage, RunState]:
    """Goes back to a checkpoint in the running job; `job` is the one before any growth."""
    clock = time.perf_counter()
    job.watchdog.beat(f"rewinding from step {failed.counters.step}", long=True)
    failed = job.saving.finish(failed)
    directory, say = job.saving.directory, job.recorder.say
    found, state = rewind_target(job.run, directory, failed, reason, say)
    job.saving.release()
    stage.release()
    run, stage, _ = begin(job.run, found, job.device, say)
    _prepare(replace(job, run=run), stage)
    state = state.add_lost_time(time.perf_counter() - clock)
    job.recorder.rewind(failed, state, None if found is None else found[0], reason)
    _forget_evaluations(job, state.counters.step)
    return replace(job, run=run), stage, state


def _forget_evaluations(job: Job, step: int) -> None:
    """`megagrow eval` may have looked at checkpoints that the run now comes to anew."""
    first = job.launch.rank == 0
    run_on_all_ranks(lambda: remove_stored_after(job.run.output_dir, step) if first else None)


def _validate(job: Job, stage: Stage, state: RunState) -> None:
    if job.inputs.validation is not None:
        job.watchdog.beat(f"the validation after step {state.counters.step}", long=True)
        masks = masks_now(job.run, stage, state.stage_step)
        loss = mean_loss(stage, job.inputs.validation, job.inputs.validation_sequences, masks)
        job.recorder.validation(state, loss)


def _evaluate(job: Job, stage: Stage, state: RunState) -> None:
    def begin(task: str) -> None:
        step = state.counters.step
        job.watchdog.beat(f"the evaluation on {task} after step {step}", long=True)

    if job.evaluation is not None:
        masks = masks_now(job.run, stage, state.stage_step)
        job.recorder.evaluation(state, job.evaluation(stage, masks, begin))


def _save(job: Job, stage: Stage, state: RunState, wait: bool = False) -> RunState:
    job.watchdog.beat(f"saving the checkpoint of step {state.counters.step}", long=True)
    return job.saving.save(stage, state, wait=wait)


def _grow(job: Job, stage: Stage, state: RunState) -> tuple[Job, Stage, RunState]:
    fixed = job.inputs.fixed

    def loss_of(run: RunConfig, stage: Stage, steps: int) -> float:
        sequences = run.stages[state.stage].batch.global_batch_size
        return mean_loss(stage, fixed, sequences, masks_now(run, stage, steps))

    clock = time.perf_counter()
    job.watchdog.beat(f"the growth after step {state.counters.step}", long=True)
    job.warm_up.report()
    losses = [loss_of(job.run, stage, state.stage_step)]
    before = predictions(stage, fixed, masks_now(job.run, stage, state.stage_step))
    length, pause = job.run.data.sequence_length, partial(_pause_growth, job, state)
    feed = Feed(job.inputs.train, state.position, length, pause)
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
    ).add_lost_time(time.perf_counter() - clock)
    job.recorder.growth(state, report, losses[0], losses[1], difference)
    if report.preserves_function:
        _check_preserved(replace(job, run=run), stage, state, losses, difference)
    return replace(job, run=run), stage, state


def _pause_growth(job: Job, state: RunState) -> None:
    """Between the steps of a growth that trains or measures."""
    job.watchdog.beat(f"the growth after step {state.counters.step}", long=True)
    if any_across_ranks(job.stop.received is not None, job.device):
        raise StopRequested(job.stop.received or "a signal on another rank")


def _check_preserved(
    job: Job, stage: Stage, state: RunState, losses: list[float], difference: Change
) -> None:
    """An exact growth that is not exact stops the run before a step is taken."""
    growth = job.run.stages[state.stage].growth
    assert growth is not None
    moved = max(abs(losses[1] - losses[0]), difference.kl)
    if any_across_ranks(not moved <= growth.tolerance, stage.topology.device):
        raise ConfigError(
            f"the growth at step {state.counters.step} by {' with '.join(growth.operator)} should "
            f"have kept the function, but the loss on a fixed batch went from {losses[0]:.6f} to "
            f"{losses[1]:.6f} (KL {difference.kl:.2e}), more than growth.tolerance = "
            f"{growth.tolerance}; no step was taken and the checkpoint before it is intact: raise "
            "the tolerance if the precision explains it, else report a bug"
        )
