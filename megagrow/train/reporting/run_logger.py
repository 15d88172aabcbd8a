"""Run logger of rank 0: metrics, resolved config, live line and one log line per event."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from megagrow.common.gpu_specs import peak_flops
from megagrow.common.log_setup import ConsoleHandler
from megagrow.config.differences import ConfigChange
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import run_flops, steps_left
from megagrow.errors import InputError, unwritable
from megagrow.model.backends import uses_bf16
from megagrow.train.growth_event.event import GrowthReport
from megagrow.train.loop import StepDone
from megagrow.train.reporting.console import LiveLine, Status
from megagrow.train.reporting.log_lines import (
    end_lines,
    evaluation_line,
    growth_fields,
    growth_line,
    hardware_line,
    sample_line,
    skipped_line,
    stage_line,
    start_line,
    validation_texts,
)
from megagrow.train.reporting.lost_records import ranges_text, steps_without_record
from megagrow.train.reporting.metrics import (
    Counters,
    MetricsLog,
    RecordKind,
    start_fields,
    train_fields,
    validation_fields,
)
from megagrow.train.reporting.run_files import write_run_files
from megagrow.train.reporting.step_profiler import StepProfiler
from megagrow.train.reporting.trackers import open_trackers
from megagrow.train.reporting.writers import Record
from megagrow.train.state_check import Change
from megagrow.train.train_state import RunState

logger = logging.getLogger(__name__)


class RunLogger:
    """Write metrics and log lines on rank 0; do nothing on the other ranks.

    Only rank 0 detects a full disk. It stores the error until `check` raises it, at a point where
    all ranks exchange errors.

    Args:
        run: the run.
        rank: this process's rank.
        world_size: number of ranks.
        environment: the content of environment.json.
        console: the handler of the log records; the live line shares its console.
        device: this rank's device.
    """

    def __init__(
        self,
        run: RunConfig,
        rank: int,
        world_size: int,
        environment: dict[str, Any],
        console: ConsoleHandler,
        device: torch.device,
    ) -> None:
        self._run = run
        self._environment = environment
        self._enabled = rank == 0
        self._stack = ExitStack()
        self._live = LiveLine(steps_left(run), run_flops(run), console.console, self._enabled)
        self._metrics: MetricsLog | None = None
        self._problem: InputError | None = None
        self._profiler = StepProfiler(run, self._enabled)
        self._device = device
        peak = run.logging.peak_flops or peak_flops(_name(device))
        self._peak = peak * world_size if peak else None
        self._world_size = world_size
        self._validation_losses: dict[str, float] = {}

    def open(self) -> None:
        """Create the run's directory and its files. Raises InputError or OSError if that fails."""
        if self._enabled:
            run = self._run
            run.output_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = self._stack.enter_context(MetricsLog(run.output_dir))
            self._metrics.attach(open_trackers(run))
            self._stack.enter_context(self._live)
            self._stack.callback(self._profiler.close)

    def check(self) -> None:
        """Raise the first error that occurred on rank 0 while writing metrics."""
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(
        self,
        run: RunConfig,
        state: RunState,
        checkpoint: Path | None,
        changes: Sequence[ConfigChange],
    ) -> None:
        """Record the start of the run, or its resumption from a checkpoint.

        `run` has the operators and lengths of its past (`Beginning.run`). `changes` are those since
        the checkpoint or the source of its weights. If the configuration differs from config.yaml,
        the file is kept as config-0001.yaml, config-0002.yaml ...
        """
        self._attempt(lambda: write_run_files(self._run, self._environment))
        name, step = self._run.name, state.counters.step
        last = step + steps_left(run, state.stage, state.stage_tokens)
        self._live.plan(last, run_flops(run))
        if checkpoint is None:
            self._write(lambda log: log.truncate_after(-1))
            self._log(start_line(self._run, last))
        else:
            stage, rewinds = state.stage, state.counters.rewinds
            self._log(f"run {name} | resume | step {step} | {checkpoint}")
            if last == step:
                self._log(f"run {name} | complete | nothing to train; increase tokens to continue")
            self._write(
                lambda log: self._report_lost(
                    log, log.truncate_after(step, stage, rewinds), state.counters
                )
            )
        bf16 = uses_bf16(run, self._device)
        self._log(hardware_line(run, self._world_size, _name(self._device), bf16))
        self._write(lambda log: log.write("start", state.counters, **start_fields(run, last)))
        self._profiler.completed(step)
        self._changes(state, changes)

    def sync(self) -> None:
        """Sync the records written so far; call before saving a checkpoint of their steps."""
        self._write(lambda log: log.sync())

    def _report_lost(self, log: MetricsLog, kept: list[Record], counters: Counters) -> None:
        """Log and record the steps before a resume that have no train record."""
        lost = steps_without_record(kept, counters.step, self._run.logging.interval)
        if lost:
            self._log(
                f"{log.path}: no record of step {ranges_text(lost)}; curves have a gap there",
                logging.WARNING,
            )
            log.write("lost", counters, steps=lost)

    def step(self, event: StepDone) -> None:
        """Record a training step at `logging.interval`, and before other records of the step."""
        counters, measure = event.state.counters, event.measure
        self._profiler.completed(counters.step)
        if measure.skipped:
            self._log(skipped_line(counters.step, measure), logging.WARNING)
        due = counters.step % self._run.logging.interval == 0
        if due or event.validate or event.evaluate or measure.skipped:
            fields = train_fields(measure, self._peak)
            self._write(lambda log: log.write("train", counters, **fields))
            status = Status(
                stage=measure.stage,
                stages=len(self._run.stages),
                step=counters.step,
                loss=measure.loss,
                grad_norm=measure.grad_norm,
                lr=measure.lr,
                tokens_per_second=fields["tokens_per_second"],
                flops=counters.flops_true - counters.growth_flops_true,
                mfu=fields["mfu"],
            )
            with suppress(OSError):  # the terminal is gone
                self._live.update(status)

    def validation(self, state: RunState, losses: dict[str, float]) -> None:
        """Record the loss of each validation set."""
        fields = {"stage": state.stage, **validation_fields(losses)}
        self._write(lambda log: log.write("validation", state.counters, **fields))
        self._validation_losses = losses
        self._log(" | ".join([f"step {state.counters.step}", *validation_texts(losses)]))

    def samples(self, state: RunState, samples: list[dict[str, str]]) -> None:
        """Record generated texts: [{"prompt": text, "text": its continuation}]."""
        fields = {"stage": state.stage, "samples": samples}
        self._write(lambda log: log.write("samples", state.counters, **fields))
        for sample in samples:
            self._log(sample_line(state.counters.step, sample))

    def evaluation(self, state: RunState, results: dict[str, Any]) -> None:
        """Record an evaluation: {"results": {task: {metric: value}}, "average": mean or None}."""
        fields = {"stage": state.stage, **results}
        self._write(lambda log: log.write("evaluation", state.counters, **fields))
        self._log(evaluation_line(state.counters.step, results))

    def checkpoint(self, state: RunState, path: Path, stall: float, seconds: float) -> None:
        """Record a saved checkpoint.

        Args:
            state: the saved state; the run may be a few steps ahead of it.
            path: the checkpoint.
            stall: seconds for which training was blocked.
            seconds: duration of the save.
        """
        fields: dict[str, Any] = {"stage": state.stage, "path": str(path)}
        fields |= {"stall_seconds": stall, "seconds": seconds}
        self._write(lambda log: log.write("checkpoint", state.counters, **fields))
        times = f"saved in {seconds:.1f} s | stall {stall:.1f} s"
        self._log(f"step {state.counters.step} | checkpoint {path} | {times}")

    def rewind(
        self,
        failed: RunState,
        state: RunState,
        path: Path | None,
        reason: str,
        changes: Sequence[ConfigChange],
    ) -> None:
        """Record a rewind from `failed` to the checkpoint at `path`, or to the initial state."""
        self._profiler.close()  # its steps are consecutive
        counters = state.counters
        last = failed.counters.rewinds
        self._write(lambda log: log.truncate_after(counters.step, state.stage, last))
        fields = {
            "stage": state.stage,
            "from_step": failed.counters.step,
            "path": None if path is None else str(path),
            "reason": reason,
            "skipped_from": counters.tokens + failed.skipped_tokens,
            "skipped_to": state.position,
        }
        self._write(lambda log: log.write("rewind", counters, **fields))
        self._log(
            f"step {failed.counters.step} | rewind to step {counters.step} | {reason} | "
            f"{path or 'initial state'} | stream tokens {fields['skipped_from']} to "
            f"{fields['skipped_to']} skipped",
            logging.WARNING,
        )
        self._changes(state, changes)

    def growth(
        self,
        state: RunState,
        report: GrowthReport,
        before: float,
        after: float,
        difference: Change,
    ) -> None:
        """Record the start of a stage, by a growth or without; `state` is the state after it."""
        fields = {"stage": state.stage, **growth_fields(report, before, after, difference)}
        kind: RecordKind = "growth" if report.operator else "stage"
        self._write(lambda log: log.write(kind, state.counters, **fields))
        line = growth_line if report.operator else stage_line
        self._log(line(self._run, state.stage, state.counters.step, report, (before, after)))

    def end(self, state: RunState, stopped: str | None) -> None:
        """Record the end of the run; `stopped` is the signal that stopped it early, if any."""
        counters = state.counters
        self._write(lambda log: log.write("end", counters, stopped=stopped))
        for line in end_lines(self._run, counters, stopped, self._validation_losses):
            self._log(line)

    def _changes(self, state: RunState, changes: Sequence[ConfigChange]) -> None:
        """Log all changes of the configuration, and record those that affect the result."""
        for change in changes:
            self._log(f"config | {change}", logging.WARNING if change.matters else logging.INFO)
        if recorded := [change.as_json() for change in changes if change.matters]:
            self._write(lambda log: log.write("config_change", state.counters, changes=recorded))

    def _log(self, line: str, level: int = logging.INFO) -> None:
        if self._enabled:
            logger.log(level, "%s", line)

    def _write(self, action: Callable[[MetricsLog], object]) -> None:
        log = self._metrics
        if log is not None:
            self._attempt(lambda: action(log))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._enabled and self._problem is None:
            try:
                action()
            except InputError as error:
                self._problem = error
            except OSError as error:
                self._problem = unwritable(Path(error.filename or self._run.output_dir), error)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
