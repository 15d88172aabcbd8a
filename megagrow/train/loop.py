"""One turn of the training loop. It trains a step and says what is due; run.py does what is due."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megagrow.config.flops import paper_flops_per_token
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import stage_steps, step_tokens
from megagrow.data.batches import Batch, BatchReader, read_micro_batches
from megagrow.errors import InputError
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.flops import flops_per_token
from megagrow.train.growth_event.new_entries import update_factors
from megagrow.train.reporting.metrics import StepMetrics
from megagrow.train.schedule import rate_at
from megagrow.train.stage import Stage, masks_now
from megagrow.train.step import peak_memory, train_step
from megagrow.train.train_state import RunState


@dataclass(frozen=True)
class StepDone:
    """A step was trained; `state` is that after it, the rest says what is due now."""

    state: RunState
    measure: StepMetrics
    validate: bool
    save: bool
    evaluate: bool = False
    rewind: str | None = None
    """Why the run has to go back to a checkpoint, if it has to."""


@dataclass(frozen=True)
class Stopped:
    """A signal asked for the end; the state is that after the last whole step."""

    state: RunState
    reason: str


@dataclass(frozen=True)
class StageEnd:
    """The stage has had all its steps."""

    state: RunState


LoopEvent = StepDone | Stopped | StageEnd


class Background(Protocol):
    """Work that goes on beside the training; the ranks find out together when it is done."""

    def busy(self) -> bool:
        """Whether it goes on on this rank."""

    def idle_everywhere(self) -> None:
        """Says that no rank was busy, on all ranks before the same step."""


def advance(
    run: RunConfig,
    stage: Stage,
    state: RunState,
    reader: BatchReader,
    stop: StopSignal,
    check: Callable[[], None] = lambda: None,
    beat: Callable[[str], None] = lambda phase: None,
    background: Background | None = None,
) -> LoopEvent:
    """Trains the next step of a stage, unless it has had all of them or a signal came.

    `beat` hears of each phase of it that begins. An error that only one rank sees (a damaged
    corpus, or what `check` raises) is raised as the same InputError on all. `background` is told
    when it is done on all ranks.
    """
    steps = stage_steps(stage.config, run.data.sequence_length)
    if state.stage_step >= steps:  # beyond, if the run was made shorter than its checkpoint
        return StageEnd(state)
    beat(f"reading the batch of step {state.counters.step + 1}")
    batches = _next_batches(stage, state, reader, stop, check, beat, background)
    if batches is None:
        return Stopped(state, stop.received or "a signal on another rank")
    beat(f"step {state.counters.step + 1}")
    measure = _measured_step(run, stage, state, batches)
    state = state.after_step(measure).guarded(run.guards, measure)
    last = state.stage_step == steps
    good = not state.guard.troubled  # else it is no state to go back to
    return StepDone(
        state,
        measure,
        validate=last or state.counters.step % run.validation.interval == 0,
        evaluate=_evaluates(run, state, last),
        save=last or (good and state.counters.step % run.checkpoint.interval == 0),
        rewind=state.guard.reason_to_rewind(run.guards),
    )


def _evaluates(run: RunConfig, state: RunState, last: bool) -> bool:
    asked = run.evaluation
    return asked is not None and (last or state.counters.step % asked.interval == 0)


def train_at(
    run: RunConfig, stage: Stage, stage_step: int, batches: list[Batch]
) -> tuple[float, float, float]:
    """Trains the step that comes when `stage_step` steps of the stage are done: with the rate, the
    masks and the factors of that place in the run. Returns loss, gradient norm and rate."""
    position = stage_step * step_tokens(stage.config, run.data.sequence_length)
    lr = rate_at(run, stage.index, position)
    stage.engine.set_update_factors(*update_factors(run, stage.index, position))
    loss, norm = train_step(stage, batches, lr, masks_now(run, stage, stage_step))
    return loss, norm, lr


def _next_batches(
    stage: Stage,
    state: RunState,
    reader: BatchReader,
    stop: StopSignal,
    check: Callable[[], None],
    beat: Callable[[str], None],
    background: Background | None,
) -> list[Batch] | None:
    """This rank's micro batches of the next step; None if any rank was told to stop."""
    grid = stage.topology.dp_rank, stage.topology.dp
    batches, problem = [], None
    try:
        check()
        batches = read_micro_batches(reader, state.position, stage.config.batch, *grid)
    except InputError as error:
        problem = error
    busy = background is not None and background.busy()
    beat(f"agreeing on step {state.counters.step + 1}")
    flags = [float(problem is not None), float(stop.received is not None), float(busy)]
    vote = torch.tensor(flags, device=stage.topology.device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    failed, stopped, busy_somewhere = vote.tolist()
    if background is not None and not busy_somewhere:
        background.idle_everywhere()
    if failed:
        run_on_all_ranks(lambda: _raise(problem))
    return None if stopped else batches


def _raise(problem: InputError | None) -> None:
    if problem is not None:
        raise problem


def _measured_step(
    run: RunConfig, stage: Stage, state: RunState, batches: list[Batch]
) -> StepMetrics:
    begin = time.perf_counter()
    length = run.data.sequence_length
    tokens = step_tokens(stage.config, length)
    loss, norm, lr = train_at(run, stage, state.stage_step, batches)
    if run.guards.loss_spike is not None:
        loss = _as_rank_0_has_it(loss, stage.topology.device)
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


def _as_rank_0_has_it(value: float, device: torch.device) -> float:
    """What a decision hangs on must not differ in its last bit."""
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()
