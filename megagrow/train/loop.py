"""One iteration of the training loop: train a step and return an event for run.py to handle."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import batch_at, step_tokens
from megagrow.data.batches import Batch
from megagrow.data.stage_streams import StreamPlace
from megagrow.errors import InputError
from megagrow.model.layers.flops import flops_per_token, paper_flops_per_token
from megagrow.parallel.agreement import (
    any_across_ranks,
    any_flags_across_ranks,
    run_on_all_ranks,
    share_values_and_flags,
)
from megagrow.parallel.pipeline.execution import AtSlot
from megagrow.parallel.update_scaling import StepLimits
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.growth_event.new_entries import update_factors
from megagrow.train.reporting.metrics import StepMetrics
from megagrow.train.schedule import other_rates_at, rate_at
from megagrow.train.stage import Stage, masks_now
from megagrow.train.step import peak_memory, train_step
from megagrow.train.step_feed import Agreement, StepFeed, StepPart, Vote
from megagrow.train.train_state import RunState


@dataclass(frozen=True)
class StepDone:
    """Event: a step was trained; the flags name the actions due after it."""

    state: RunState
    """State after the step."""
    measure: StepMetrics
    validate: bool
    save: bool
    sample: bool = False
    evaluate: bool = False
    rewind: str | None = None
    """Reason to rewind to a checkpoint, or None."""


REMOTE_SIGNAL = "a signal on another rank"


@dataclass(frozen=True)
class Stopped:
    """Event: a signal requested a stop; `state` is the state after the last completed step."""

    state: RunState
    reason: str


@dataclass(frozen=True)
class StageEnd:
    """Event: all steps of the stage are done."""

    state: RunState


LoopEvent = StepDone | Stopped | StageEnd


class Background(Protocol):
    """Work that runs in parallel to training, such as an asynchronous save."""

    def busy(self) -> bool:
        """Return True while this rank is still working."""

    def due(self) -> bool:
        """Return True on rank 0 if a checkpoint is due by its clock."""

    def idle_everywhere(self) -> None:
        """Finish the work; called on all ranks before the same step, when no rank is busy."""


@dataclass(frozen=True)
class StepHooks:
    """Callbacks around a step."""

    check: Callable[[], None] = lambda: None
    """Raises an InputError of this rank that all ranks must see."""
    beat: Callable[[str], None] = lambda phase: None
    """Receives the name of each phase of the step as it begins."""
    beat_long: Callable[[str], None] = lambda phase: None
    """The same, for a phase that may take long."""
    background: Background | None = None


def advance(
    run: RunConfig,
    stage: Stage,
    state: RunState,
    feed: StepFeed,
    stop: StopSignal,
    hooks: StepHooks = StepHooks(),
) -> LoopEvent:
    """Train the next step of a stage, unless all are done or a signal arrived. Collective.

    A signal during the last step of a stage stops the run before the growth.

    An error of a single rank in reading the step (a damaged corpus) or of `hooks.check` is raised
    on all ranks with the same class.
    """
    if state.stage_tokens >= stage.config.tokens:
        grows = stage.index + 1 < len(run.stages)
        if grows and any_across_ranks(stop.received is not None, stage.topology.device):
            return Stopped(state, stop.received or REMOTE_SIGNAL)
        return StageEnd(state)
    begin = time.perf_counter()
    number = state.counters.step + 1
    agreement = _agreement(stage, state, feed, stop, hooks)
    waited = time.perf_counter() - begin
    if hooks.background is not None and not agreement.busy:
        hooks.beat_long(f"publishing the checkpoint before step {number}")
        hooks.background.idle_everywhere()
    if agreement.failed:
        run_on_all_ranks(agreement.vote.raise_problem)
    if agreement.stopped:
        return Stopped(state, stop.received or REMOTE_SIGNAL)
    measure = _measured_step(run, stage, state, feed, partial(_vote, feed, stop, hooks), hooks)
    measure = replace(measure, seconds=measure.seconds + waited)
    state = state.after_step(measure).guarded(run.guards, measure)
    last = state.stage_tokens >= stage.config.tokens
    good = not state.guard.troubled  # otherwise not a rewind target
    validation, evaluation = stage.config.validation, stage.config.evaluation
    samples = None if run.samples is None else run.samples.interval or validation.interval
    tasks = None if evaluation is None else evaluation.interval
    event = StepDone(
        state,
        measure,
        validate=_is_due(validation.interval, state, last),
        sample=_is_due(samples, state, last),
        evaluate=_is_due(tasks, state, last),
        save=last or (good and _saves(run, state, feed.agreement)),
        rewind=state.guard.reason_to_rewind(run.guards),
    )
    if any((event.validate, event.sample, event.evaluate, event.save, event.rewind)):
        feed.agreement = None  # a signal may arrive meanwhile
    return event


def _saves(run: RunConfig, state: RunState, agreement: Agreement | None) -> bool:
    """Return True if a checkpoint is due after this step, by its number or by rank 0's clock."""
    interval = run.checkpoint.interval
    if isinstance(interval, int):
        return state.counters.step % interval == 0
    return agreement is not None and agreement.due


def _is_due(interval: int | None, state: RunState, last: bool) -> bool:
    """Return True if a measurement at an interval of steps is due; None disables it."""
    return interval is not None and (last or state.counters.step % interval == 0)


def train_at(
    run: RunConfig,
    stage: Stage,
    stage_tokens: int,
    batches: list[Batch],
    limits: StepLimits | None = None,
    at_slot: AtSlot = lambda slot, slots: None,
) -> tuple[torch.Tensor, float]:
    """Train the step after `stage_tokens` tokens of the stage, with the learning rate, masks and
    update factors of that position. Returns the result of `train_step` and the learning rate."""
    lr = rate_at(run, stage.index, stage_tokens)
    stage.engine.set_update_factors(*update_factors(run, stage.index, stage_tokens))
    others = other_rates_at(run, stage.index, stage_tokens)
    masks = masks_now(run, stage, stage_tokens)
    return train_step(stage, batches, lr, masks, others, limits, at_slot), lr


def _agreement(
    stage: Stage, state: RunState, feed: StepFeed, stop: StopSignal, hooks: StepHooks
) -> Agreement:
    """Return the votes on the next step: those of the end of the previous step, or new ones."""
    part = _part(stage, state.place, state.stage_tokens)
    number = state.counters.step + 1
    if feed.agreement is not None and feed.agreement.vote.part == part:
        return feed.agreement
    vote = _vote(feed, stop, hooks, part, number)
    hooks.beat(f"agreeing on step {number}")
    return Agreement(vote, *any_flags_across_ranks(vote.flags, part.device))


def _part(stage: Stage, place: StreamPlace, stage_tokens: int) -> StepPart:
    return StepPart.of(place, batch_at(stage.config, stage_tokens), stage.topology, stage.ops)


def _vote(feed: StepFeed, stop: StopSignal, hooks: StepHooks, part: StepPart, number: int) -> Vote:
    """Return the vote of this rank on a step; waits until its micro-batches are read."""
    hooks.beat(f"reading the batch of step {number}")
    problem = None
    try:
        hooks.check()
        feed.read(part)
    except (InputError, OSError) as error:
        problem = error
    background = hooks.background
    busy = background is not None and background.busy()
    due = background is not None and background.due()
    return Vote(part, problem, stop.received is not None, busy, due)


def _measured_step(
    run: RunConfig,
    stage: Stage,
    state: RunState,
    feed: StepFeed,
    vote: Callable[[StepPart, int], Vote],
    hooks: StepHooks,
) -> StepMetrics:
    """Train a step that the ranks have agreed on, and vote on the next one of the stage.

    All that the host must know of the step arrives in one collective at its end, with the votes on
    the next one: the only point at which it waits for the device.
    """
    begin, number = time.perf_counter(), state.counters.step + 1

    def at_slot(slot: int, slots: int) -> None:
        hooks.beat(f"step {number}, slot {slot + 1} of {slots}")

    hooks.beat(f"step {number}")
    length, model = stage.config.data.sequence_length, stage.config.model
    tokens = step_tokens(stage.config, state.stage_tokens)
    done = state.stage_tokens + tokens
    last = done >= stage.config.tokens
    batches = feed.read(_part(stage, state.place, state.stage_tokens))
    following = _part(stage, state.place.after(tokens), done)
    if not last:
        feed.prefetch(following)
    limits = state.guard.limits(run.guards)
    result, lr = train_at(run, stage, state.stage_tokens, batches, limits, at_slot)
    own = Vote(following) if last else vote(following, number + 1)
    hooks.beat(f"completing step {number}")
    (loss, norm, z_loss, exceeded), flags = share_values_and_flags(result, own.flags)
    feed.agreement = None if last else Agreement(own, *flags)
    return StepMetrics(
        stage=stage.index,
        loss=loss,
        lr=lr,
        grad_norm=norm,
        z_loss=z_loss if stage.config.optimizer.z_loss_multiplier else None,
        tokens=tokens,
        flops=paper_flops_per_token(model) * tokens,
        flops_true=flops_per_token(model, length) * tokens,
        seconds=time.perf_counter() - begin,
        memory_bytes=peak_memory(stage.topology.device),
        position=state.position,
        skipped=bool(exceeded) or not math.isfinite(norm),
    )
