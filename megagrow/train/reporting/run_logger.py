"""What rank 0 shows and writes down: the live line, the metrics, the resolved config."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megagrow.common.gpu_specs import peak_flops
from megagrow.common.sizes import format_duration, format_short
from megagrow.config.flops import parameters
from megagrow.config.load import to_yaml
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.errors import InputError, unwritable
from megagrow.train.flops import run_flops
from megagrow.train.growth_event.event import GrowthReport
from megagrow.train.growth_event.function_check import Change
from megagrow.train.loop import StepDone
from megagrow.train.reporting.console import LiveLine, Status
from megagrow.train.reporting.metrics import MetricsLog, start_fields, train_fields
from megagrow.train.run_position import run_steps
from megagrow.train.train_state import RunState


class RunLogger:
    """Writes into the run's directory and to the terminal on rank 0; does nothing elsewhere.

    Rank 0 alone sees that the disk is full. It keeps the problem until all ranks are ready to hear
    of it: `check` raises it, and is called where they agree on going on.
    """

    def __init__(
        self, run: RunConfig, rank: int, world_size: int, environment: dict[str, Any]
    ) -> None:
        self._run = run
        self._environment = environment
        self._enabled = rank == 0
        self._stack = ExitStack()
        self._live = LiveLine(run_steps(run), run_flops(run), self._enabled)
        self._metrics: MetricsLog | None = None
        self._problem: InputError | None = None
        peak = run.logging.peak_flops or _device_peak()
        self._peak = peak * world_size if peak else None

    def open(self) -> None:
        """Creates the run's directory and what is in it. InputError or OSError if it cannot."""
        if self._enabled:
            run = self._run
            run.output_dir.mkdir(parents=True, exist_ok=True)
            (run.output_dir / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
            environment = json.dumps(self._environment, indent=1)
            (run.output_dir / "environment.json").write_text(environment, encoding="utf-8")
            self._metrics = self._stack.enter_context(
                MetricsLog(
                    run.output_dir, run.logging.tensorboard, run.logging.wandb_project, run.name
                )
            )
            self._stack.enter_context(self._live)

    def check(self) -> None:
        """Raises what went wrong on rank 0 when something was to be written down."""
        if self._problem is not None:
            raise self._problem

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """A line for good on the terminal."""
        self._attempt(lambda: self._live.say(text))

    def start(self, state: RunState, checkpoint: Path | None) -> None:
        """The run begins, or goes on from a checkpoint."""
        if checkpoint is None:
            self._write(lambda log: log.truncate_after(-1))
            sizes = " -> ".join(format_short(parameters(s.model)) for s in self._run.stages)
            self.say(f"{self._run.name}: a run of {run_steps(self._run)} steps, parameters {sizes}")
        else:
            step, stage = state.counters.step, state.stage
            self._write(lambda log: log.truncate_after(step, stage, state.counters.rewinds))
            self.say(f"{self._run.name}: goes on from {checkpoint}, step {step}")
        self._write(lambda log: log.write("start", state.counters, **start_fields(self._run)))

    def step(self, event: StepDone) -> None:
        """A step was trained."""
        counters, measure = event.state.counters, event.measure
        if measure.skipped:
            self.say(f"step {counters.step}: loss or gradient not finite, the step is skipped")
        due = counters.step % self._run.logging.interval == 0
        if due or event.validate or event.evaluate or measure.skipped:
            fields = train_fields(measure, self._peak)
            self._write(lambda log: log.write("train", counters, **fields))
            status = Status(
                stage=measure.stage,
                stages=len(self._run.stages),
                step=counters.step,
                loss=measure.loss,
                lr=measure.lr,
                tokens_per_second=fields["tokens_per_second"],
                flops=counters.flops_true - counters.growth_flops_true,
                mfu=fields["mfu"],
            )
            self._attempt(lambda: self._live.update(status))

    def validation(self, state: RunState, loss: float) -> None:
        """The validation loss was measured."""
        fields = {"stage": state.stage, "loss": loss}
        self._write(lambda log: log.write("validation", state.counters, **fields))
        self.say(f"step {state.counters.step}: validation loss {loss:.4f}")

    def evaluation(self, state: RunState, found: dict[str, Any]) -> None:
        """The model was evaluated: `found` is {"results": {task: {metric: value}}, "average"}."""
        fields = {"stage": state.stage, **found}
        self._write(lambda log: log.write("evaluation", state.counters, **fields))
        self.say(f"step {state.counters.step}: evaluation: {', '.join(_told(found))}")

    def checkpoint(self, state: RunState, path: Path, stall: float, seconds: float) -> None:
        """A checkpoint of a state was saved, `seconds` after that began, and the training stood
        still for `stall` of them; the run may be a few steps further than the state by now."""
        fields: dict[str, Any] = {"stage": state.stage, "path": str(path)}
        fields |= {"stall_seconds": stall, "seconds": seconds}
        self._write(lambda log: log.write("checkpoint", state.counters, **fields))
        step, spent = state.counters.step, f"in {seconds:.1f} s, training waited {stall:.1f} s"
        self.say(f"step {step}: saved {path} {spent}")

    def rewind(self, failed: RunState, state: RunState, path: Path | None, reason: str) -> None:
        """The run went back from where it failed to a checkpoint, or to its initial state."""
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
        self.say(
            f"step {failed.counters.step}: {reason}; back to {path or 'the initial state'}, step "
            f"{counters.step}, without tokens {fields['skipped_from']} to {fields['skipped_to']} "
            "of the stream"
        )

    def growth(
        self,
        state: RunState,
        report: GrowthReport,
        before: float,
        after: float,
        difference: Change,
    ) -> None:
        """The model grew; `state` is that after the growth."""
        fields: dict[str, Any] = {"stage": state.stage, "loss_before": before}
        fields |= {"loss_after": after, "kl": difference.kl, "logits_difference": difference.logits}
        fields |= {n: getattr(report, n) for n in report.__dataclass_fields__ if n != "spent"}
        fields["operator"] = "+".join(report.operator)
        fields["learning_losses"] = report.spent.losses[:: max(1, len(report.spent.losses) - 1)]
        self._write(lambda log: log.write("growth", state.counters, **fields))
        old, new = (self._run.stages[i].model for i in (state.stage - 1, state.stage))
        self.say(
            f"step {state.counters.step}: grew by {fields['operator']} from {_shape(old)} to "
            f"{_shape(new)}, {format_short(parameters(old))} -> {format_short(parameters(new))} "
            f"parameters, in {report.seconds:.1f} s ({format_short(report.bytes_between_ranks)}B "
            f"between ranks); loss on a fixed batch {before:.3f} -> {after:.3f}"
        )

    def end(self, state: RunState, stopped: str | None) -> None:
        """The run is over, or was stopped by a signal."""
        counters = state.counters
        self._write(lambda log: log.write("end", counters, stopped=stopped))
        how = f"stopped by {stopped}; the same command goes on" if stopped else "done"
        spent = format_duration(counters.elapsed_seconds)
        self.say(
            f"{self._run.name}: {how}. {counters.step} steps, {counters.tokens} tokens, {spent}"
        )

    def _write(self, action: Callable[[MetricsLog], None]) -> None:
        log = self._metrics
        if log is not None:
            self._attempt(lambda: action(log))

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._enabled and self._problem is None:
            try:
                action()
            except InputError as error:
                self._problem = error
            except OSError as error:  # what we print may well go to a file on a full disk
                self._problem = unwritable(Path(error.filename or "standard output"), error)


def _told(found: dict[str, Any]) -> Iterator[str]:
    """The average, and of each task the accuracy, or else what it measures first."""
    if found["average"] is not None:
        yield f"average {found['average']:.3f}"
    for task, metrics in found["results"].items():
        named = [name for name in ("acc_norm", "acc", *metrics) if name in metrics]
        yield from (f"{task} {name} {metrics[name]:.4g}" for name in named[:1])


def _shape(model: ModelConfig) -> str:
    """`24L2048H`, as the paper writes it."""
    return f"{model.num_hidden_layers}L{model.hidden_size}H"


def _device_peak() -> float | None:
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
