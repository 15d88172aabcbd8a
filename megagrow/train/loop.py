"""One iteration of the training loop: train a step and return an event for run.py to handle."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megagrow.config.flops import flops_per_token, paper_flops_per_token
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import step_tokens
from megagrow.data.batches import Batch, BatchReader, read_micro_batches
from megagrow.errors import InputError
from megagrow.parallel.agreement import any_across_ranks, run_on_all_ranks
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.growth_event.new_entries import update_factors
from megagrow.train.reporting.metrics import StepMetrics
from megagrow.train.schedule import rate_at
from megagrow.train.stage import Stage, masks_now
from megagrow.train.step import peak_memory, train_step
from megagrow.train.train_state import RunState


@dataclass(frozen=True)
class StepDone:
    """Event: a step was trained; the flags name the actions due after it."""

    state: RunState
    """State after the step."""
    measure: StepMetrics
    validate: bool
    save: bool
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
    reader: BatchReader,
    stop: StopSignal,
    hooks: StepHooks = StepHooks(),
) -> LoopEvent:
    """Train the next step of a stage, unless all are done or a signal arrived. Collective.

    A signal during the last step of a stage stops the run before the growth.

    An InputError of a single rank (a damaged corpus, or an error of `hooks.check`) is raised on all
    ranks with the same class.
    """
    if state.stage_tokens >= stage.config.tokens:
        grows = stage.index + 1 < len(run.stages)
        if grows and any_across_ranks(stop.received is not None, stage.topology.device):
            return Stopped(state, stop.received or REMOTE_SIGNAL)
        return StageEnd(state)
    hooks.beat(f"reading the batch of step {state.counters.step + 1}")
    batches = _next_batches(stage, state, reader, stop, hooks)
    if batches is None:
        return Stopped(state, stop.received or REMOTE_SIGNAL)
    hooks.beat(f"step {state.counters.step + 1}")
    measure = _measured_step(run, stage, state, batches)
    state = state.after_step(measure).guarded(run.guards, measure)
    last = state.stage_tokens >= stage.config.tokens
    good = not state.guard.troubled  # otherwise not a rewind target
    return StepDone(
        state,
        measure,
        validate=last or state.counters.step % run.validation.interval == 0,
        evaluate=_evaluates(run, state, last),
        save=last or (good and state.counters.step % run.checkpoint.interval == 0),
        rewind=state.guard.reason_to_rewind(run.guards),
    )


def _evaluates(run: RunConfig, state: RunState, last: bool) -> bool:
    evaluation = run.evaluation
    return evaluation is not None and (last or state.counters.step % evaluation.interval == 0)


def train_at(
    run: RunConfig, stage: Stage, stage_tokens: int, batches: list[Batch]
) -> tuple[float, float, float]:
    """Train the step after `stage_tokens` tokens of the stage, with the learning rate, masks and
    update factors of that position. Returns loss, gradient norm and learning rate."""
    lr = rate_at(run, stage.index, stage_tokens)
    stage.engine.set_update_factors(*update_factors(run, stage.index, stage_tokens))
    loss, norm = train_step(stage, batches, lr, masks_now(run, stage, stage_tokens))
    return loss, norm, lr


def _next_batches(
    stage: Stage,
    state: RunState,
    reader: BatchReader,
    stop: StopSignal,
    hooks: StepHooks,
) -> list[Batch] | None:
    """Read this rank's micro-batches of the next step; None if any rank received a signal.

    One all-reduce carries all flags, so that the usual step needs no further collective.
    """
    grid = stage.topology.dp_rank, stage.topology.dp
    batches, problem = [], None
    try:
        hooks.check()
        batches = read_micro_batches(reader, state.position, stage.config.batch, *grid)
    except InputError as error:
        problem = error
    background = hooks.background
    busy = background is not None and background.busy()
    hooks.beat(f"agreeing on step {state.counters.step + 1}")
    flags = [float(problem is not None), float(stop.received is not None), float(busy)]
    vote = torch.tensor(flags, device=stage.topology.device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    failed, stopped, busy_somewhere = vote.tolist()
    if background is not None and not busy_somewhere:
        hooks.beat_long(f"publishing the checkpoint before step {state.counters.step + 1}")
        background.idle_everywhere()
    if failed:
        run_on_all_ranks(lambda: _raise_if(problem))
    return None if stopped else batches


def _raise_if(problem: InputError | None) -> None:
    if problem is not None:
        raise problem


def _measured_step(
    run: RunConfig, stage: Stage, state: RunState, batches: list[Batch]
) -> StepMetrics:
    begin = time.perf_counter()
    length = run.data.sequence_length
    tokens = step_tokens(stage.config, length)
    loss, norm, lr = train_at(run, stage, state.stage_tokens, batches)
    if run.guards.loss_spike is not None:
        loss = _broadcast(loss, stage.topology.device)
    model = stage.config.model
    return StepMetrics(
        stage=stage.index,
        loss=loss,
        lr=lr,
        grad_norm=norm,
        tokens=tokens,
        flops=paper_flops_per_token(model) * tokens,
        flops_true=flops_per_token(model, length) * tokens,
        seconds=time.perf_counter() - begin,
        memory_bytes=peak_memory(stage.topology.device),
        position=state.position,
        skipped=not math.isfinite(norm),
    )


def _broadcast(value: float, device: torch.device) -> float:
    """Return rank 0's value on all ranks, since rounding differences must not split decisions."""
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()
