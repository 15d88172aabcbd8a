"""One run, top to bottom: from its config to its last checkpoint."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from megagrow.checkpoint.discovery import FoundCheckpoint
from megagrow.common.directory_lock import PATIENCE, lock_directory
from megagrow.common.log_setup import LogLevel, configure_logging
from megagrow.config.growth_guidelines import timing_warnings
from megagrow.config.parallel_rules import world_problems
from megagrow.config.schema import RunConfig
from megagrow.errors import ConfigError
from megagrow.evaluation.evaluator import Evaluator
from megagrow.evaluation.results_store import remove_stored_after
from megagrow.growth.validation import growth_problems
from megagrow.parallel.agreement import any_across_ranks, run_on_all_ranks, run_on_rank_zero
from megagrow.parallel.launch import Launch, read_launch
from megagrow.parallel.process_groups import leave_process_group
from megagrow.planning.memory_fit import fit_to_devices
from megagrow.train.checkpointer import Checkpointer
from megagrow.train.data_setup import Inputs, open_inputs_on_all_ranks
from megagrow.train.fault_tolerance.signals import StopRequested, StopSignal
from megagrow.train.fault_tolerance.watchdog import Watchdog, watched_ranks
from megagrow.train.growth_event.cost import Feed
from megagrow.train.growth_event.event import end_stage
from megagrow.train.growth_event.operator_search import grow_best
from megagrow.train.kernel_selection import check_kernels
from megagrow.train.kernel_warmup import WarmUp
from megagrow.train.loop import StageEnd, StepDone, StepHooks, Stopped, advance
from megagrow.train.reporting.run_files import describe_environment
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.resume import Beginning, begin, rewind_target
from megagrow.train.stage import Stage, masks_now
from megagrow.train.state_check import (
    change,
    check_preserved,
    fixed_loss,
    fixed_tokens,
    predictions,
    unfit_reason,
)
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Components of a running job; `run` is replaced when a growth chooses its operator."""

    run: RunConfig
    configured: RunConfig
    """The run before growths chose operators."""
    launch: Launch
    device: torch.device
    inputs: Inputs
    feed: StepFeed
    evaluator: Evaluator
    run_logger: RunLogger
    checkpointer: Checkpointer
    watchdog: Watchdog
    stop: StopSignal
    warm_up: WarmUp
    begin: Callable[[RunConfig, FoundCheckpoint | None], Beginning]
    """`resume.begin` of this run."""


def train(
    run: RunConfig, log_level: str = LogLevel.INFO, allowed: Sequence[str] = ()
) -> str | None:
    """Train a run to its end, from its newest checkpoint if it has one. Collective.

    Args:
        run: the run.
        log_level: lowest severity printed by rank 0.
        allowed: keys whose changes may contradict the checkpoint (`--allow-change`).

    Returns the name of the signal that stopped it early, or None.
    """
    launch = read_launch()
    console = configure_logging(log_level, launch.rank, launch.world_size)
    problems = growth_problems(run) or world_problems(run, launch.world_size)
    if problems:
        raise ConfigError("; ".join(problems))
    ranks = watched_ranks(launch, run.guards.hang_timeout, run.deterministic_mode)
    with ranks as (device, watchdog):
        run = fit_to_devices(run, device)
        watchdog.beat("opening the data", long=True)
        checks = check_kernels(run, device, launch)
        inputs = open_inputs_on_all_ranks(run)
        evaluator = Evaluator(run, inputs, device)
        environment = describe_environment(run, device, launch.world_size)
        environment["contents"] = inputs.contents.model_dump()
        run_logger = RunLogger(run, launch.rank, launch.world_size, environment, console, device)
        watchdog.beat("locking the run directory", long=True, at_least=2 * PATIENCE)
        lock = run_on_all_ranks(lambda: lock_directory(run.output_dir, launch.rank))
        warm_up = WarmUp(device, launch.local_rank, checks)
        stop_signal = StopSignal(announce=launch.rank == 0)
        with lock, run_logger, warm_up, StepFeed(inputs.train) as feed, stop_signal as stop:
            run_on_all_ranks(run_logger.open)
            checkpointer = Checkpointer(run, launch.rank, device, environment, run_logger)
            job = Job(
                run=run,
                configured=run,
                launch=launch,
                device=device,
                inputs=inputs,
                feed=feed,
                evaluator=evaluator,
                run_logger=run_logger,
                checkpointer=checkpointer,
                watchdog=watchdog,
                stop=stop,
                warm_up=warm_up,
                begin=partial(
                    begin, device=device, contents=inputs.contents, allowed=allowed, checks=checks
                ),
            )
            try:
                with checkpointer:
                    stopped = _train(job)
                run_on_all_ranks(run_logger.check)
                watchdog.beat("leaving", long=True)
                leave_process_group()
            except RuntimeError:  # torch.distributed raises it for every backend
                watchdog.raise_if_peer_lost()  # before another start can lock the directory
                raise
        return stopped


def _train(job: Job) -> str | None:
    if job.launch.rank == 0:
        for corpus in job.inputs.epochs:
            logger.info("%s", corpus.line())
        for warning in (*timing_warnings(job.run), *job.inputs.warnings):
            logger.warning("%s", warning)
    (job, stage, state), warm = _begin(job), None
    try:
        while True:
            # The first step of an engine may have to compile kernels.
            hooks = _step_hooks(job, long=stage is not warm)
            event = advance(job.run, stage, state, job.feed, job.stop, hooks)
            state, warm = job.checkpointer.account(event.state), stage
            match event:
                case StepDone():
                    job.run_logger.step(event)
                    if event.rewind is not None:
                        job, stage, state = _rewind(job, stage, state, event.rewind)
                        continue
                    if event.validate:
                        job.evaluator.validate(job.run, stage, state, job.run_logger, job.watchdog)
                    if event.sample:
                        job.evaluator.sample(job.run, stage, state, job.run_logger, job.watchdog)
                    if event.evaluate:
                        job.evaluator.evaluate(job.run, stage, state, job.run_logger, job.watchdog)
                    if event.save:
                        job, stage, state = _save(job, stage, state)
                case StageEnd() if stage.index + 1 < len(job.run.stages):
                    job, stage, state = _begin_next_stage(job, stage, state)
                case StageEnd() | Stopped():
                    break
    except StopRequested as request:  # the run resumes from the checkpoint before the growth
        job.run_logger.end(state, str(request))
        return str(request)
    job.watchdog.beat("waiting for a save", long=True)
    state = job.checkpointer.finish(state)
    if job.checkpointer.last_step < state.counters.step:
        job, stage, state = _save(job, stage, state, stopped=True)
    stopped = event.reason if isinstance(event, Stopped) else None
    job.run_logger.end(state, stopped)
    stage.release()
    return stopped


def _step_hooks(job: Job, long: bool) -> StepHooks:
    return StepHooks(
        check=job.run_logger.check,
        beat=partial(job.watchdog.beat, long=long),
        beat_long=partial(job.watchdog.beat, long=True),
        background=job.checkpointer,
    )


def _begin(job: Job) -> tuple[Job, Stage, RunState]:
    """Load the newest valid checkpoint, or build the initial state.

    Rewinds if the state cannot be used, as earlier versions may have saved it.
    """
    job.watchdog.beat("the start of the run", long=True)
    found = job.checkpointer.newest()
    run, stage, state, changes, environment = job.begin(job.run, found)
    job.checkpointer.inherit(environment)
    job.run_logger.start(run, state, None if found is None else found[0], changes)
    step = -1 if found is None else state.counters.step
    run_on_rank_zero(lambda: remove_stored_after(run.output_dir, step))
    job = replace(job, run=run)
    _prepare(job, stage)
    reason = None if found is None else _unfit_reason(job, stage, state)
    return (job, stage, state) if reason is None else _rewind(job, stage, state.unstable(), reason)


def _prepare(job: Job, stage: Stage) -> None:
    """Prepare asynchronous saves of a stage and precompile the kernels of the next one."""
    job.checkpointer.prepare(stage)
    job.warm_up.prepare(job.run, stage.index)


def _rewind(job: Job, stage: Stage, failed: RunState, reason: str) -> tuple[Job, Stage, RunState]:
    """Rewind the running job to a checkpoint."""
    clock = time.perf_counter()
    job.watchdog.beat(f"rewinding from step {failed.counters.step}", long=True)
    failed = job.checkpointer.finish(failed)
    # Growths after the checkpoint choose their operators again.
    job = replace(job, run=job.configured)
    found, state = rewind_target(job.run, job.checkpointer.directory, failed, reason)
    job.checkpointer.rewound_to(found)
    job.checkpointer.release()
    stage.release()
    run, stage, _, changes, _ = job.begin(job.run, found)
    _prepare(replace(job, run=run), stage)
    state = state.add_lost_time(time.perf_counter() - clock)
    job.run_logger.rewind(failed, state, None if found is None else found[0], reason, changes)
    run_on_rank_zero(partial(remove_stored_after, run.output_dir, state.counters.step))
    return replace(job, run=run), stage, state


def _save(
    job: Job, stage: Stage, state: RunState, *, stopped: bool = False
) -> tuple[Job, Stage, RunState]:
    """Save a checkpoint. If the state cannot be used, rewind, or save nothing if the run stops."""
    job.watchdog.beat(f"saving the checkpoint of step {state.counters.step}", long=True)
    reason = _unfit_reason(job, stage, state)
    if reason is None:
        return job, stage, job.checkpointer.save(stage, state, stopped=stopped)
    if not stopped:
        return _rewind(job, stage, state.unstable(), reason)
    if job.launch.rank == 0:
        logger.warning("step %d | not saved | %s", state.counters.step, reason)
    return job, stage, state


def _unfit_reason(job: Job, stage: Stage, state: RunState) -> str | None:
    return unfit_reason(job.run, stage, state, job.inputs.stages[stage.index].fixed)


def _begin_next_stage(job: Job, stage: Stage, state: RunState) -> tuple[Job, Stage, RunState]:
    """Transfer the state to the next stage, grown if it has a growth, and verify transitions that
    preserve the function.

    Rewinds instead if the state cannot be used.
    """
    fixed = job.inputs.fixed_for(stage.index + 1)
    loss_of = partial(fixed_loss, fixed=fixed)
    clock = time.perf_counter()
    grows = job.run.stages[stage.index + 1].growth is not None
    event = f"the {'growth' if grows else 'transition'} after step {state.counters.step}"
    job.watchdog.beat(event, long=True)
    reason = _unfit_reason(job, stage, state)
    if reason is not None:
        return _rewind(job, stage, state.unstable(), reason)
    job.checkpointer.release()
    job.warm_up.report()
    losses = [loss_of(job.run, stage, state.stage_tokens)]
    before = predictions(stage, fixed, masks_now(job.run, stage, state.stage_tokens))
    before_step = partial(_before_growth_step, job, state)
    feed = Feed(job.feed, state.next_place, before_step)
    run, stage, report, search_cost = grow_best(job.run, end_stage(stage), feed, loss_of)
    losses.append(loss_of(run, stage, 0))
    difference = change(before, predictions(stage, fixed, masks_now(run, stage, 0)))
    cost = report.spent.plus(search_cost)
    state = state.after_growth(
        report.layers,
        report.operator,
        tokens=cost.tokens,
        flops=cost.flops,
        flops_true=cost.flops_true,
    ).add_lost_time(time.perf_counter() - clock)
    job.run_logger.growth(state, report, losses[0], losses[1], difference)
    if report.preserves_function:
        tokens = fixed_tokens(run, fixed)
        check_preserved(run, stage, state.counters.step, losses, difference, tokens)
    job = replace(job, run=run)
    _prepare(job, stage)
    return job, stage, state


def _before_growth_step(job: Job, state: RunState) -> None:
    """Report progress and react to signals between the steps of a growth that trains."""
    job.watchdog.beat(f"the growth after step {state.counters.step}", long=True)
    if any_across_ranks(job.stop.received is not None, job.device):
        raise StopRequested(job.stop.received or "a signal on another rank")
