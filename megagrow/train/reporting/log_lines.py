"""Log lines of a run's events: fields separated by ` | `, without the time."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from megagrow.common.sizes import format_duration, format_short
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.config.sections import UNNAMED_SET
from megagrow.config.stage import StageConfig
from megagrow.errors import printable
from megagrow.model.layers.flops import parameters
from megagrow.train.growth_event.event import GrowthReport
from megagrow.train.reporting.metrics import Counters, StepMetrics
from megagrow.train.state_check import Change

SAMPLE_CHARACTERS = 160
"""Maximum length of a sample's prompt and text in the log; metrics.jsonl has all of them."""


def start_line(run: RunConfig, last_step: int) -> str:
    """Return the line of a new run: its steps, and the parameters of its stages."""
    sizes = " -> ".join(format_short(parameters(stage.model)) for stage in run.stages)
    return f"run {run.name} | start | {last_step} steps | {sizes} parameters"


def hardware_line(run: RunConfig, world_size: int, device: str, bf16: bool) -> str:
    """Return the line of a run's hardware, precision, layout of each stage, and directory."""
    layouts = (_layout(stage, world_size) for stage in run.stages)
    return (
        f"run {run.name} | {world_size} x {device} | {'bf16' if bf16 else 'fp32'} | "
        f"{' -> '.join(layout for layout, _ in groupby(layouts))} | {run.output_dir}"
    )


def growth_line(
    run: RunConfig, stage: int, step: int, report: GrowthReport, losses: tuple[float, float]
) -> str:
    """Return the line of a growth into `stage`; `losses` are on one batch, before and after it."""
    old, new = (run.stages[index].model for index in (stage - 1, stage))
    return (
        f"step {step} | growth {'+'.join(report.operator)} | {_shape(old)} -> {_shape(new)} | "
        f"{format_short(parameters(old))} -> {format_short(parameters(new))} parameters | "
        f"fixed-batch loss {losses[0]:.3f} -> {losses[1]:.3f} | {report.seconds:.1f} s | "
        f"{_sent(run, stage, report)}"
    )


def _sent(run: RunConfig, stage: int, report: GrowthReport) -> str:
    text = f"{format_short(report.bytes_between_ranks)}B between ranks"
    if run.stages[stage].parallel.is_pipeline:
        pipelines = format_short(report.bytes_between_pipeline_ranks)
        text += f", {pipelines}B between pipeline ranks"
    return text


def growth_fields(
    report: GrowthReport, before: float, after: float, difference: Change
) -> dict[str, Any]:
    """Return the fields of a growth or stage record; the losses are on the fixed batch."""
    fields: dict[str, Any] = {"loss_before": before, "loss_after": after}
    fields |= {"kl": difference.kl, "logits_difference": difference.logits}
    fields |= {n: getattr(report, n) for n in report.__dataclass_fields__ if n != "spent"}
    fields["operator"] = "+".join(report.operator)
    fields["learning_losses"] = report.spent.losses[:: max(1, len(report.spent.losses) - 1)]
    return fields


def stage_line(
    run: RunConfig, stage: int, step: int, report: GrowthReport, losses: tuple[float, float]
) -> str:
    """Return the line of the start of a stage without growth, as `growth_line`."""
    old, new = (run.stages[index] for index in (stage - 1, stage))
    fields = {
        "sequence length": (old.data.sequence_length, new.data.sequence_length),
        "rope_theta": (old.model.rope_theta, new.model.rope_theta),
    }
    changed = [f"{name} {a:g} -> {b:g}" for name, (a, b) in fields.items() if a != b]
    return " | ".join(
        [
            *(f"step {step}", f"stage {stage} begins", *changed),
            f"fixed-batch loss {losses[0]:.3f} -> {losses[1]:.3f}",
            f"{report.seconds:.1f} s",
            _sent(run, stage, report),
        ]
    )


def skipped_line(step: int, measure: StepMetrics) -> str:
    """Return the line of a step that updated nothing, with the reason."""
    reason = "loss or gradient not finite"
    if measure.grad_norm is not None and math.isfinite(measure.grad_norm):
        values = f"loss {measure.loss:.4f}, grad norm {measure.grad_norm:.4g}"
        reason = f"{values}: an outlier of guards.skip_step"
    return f"step {step} | skipped | {reason}"


def sample_line(step: int, sample: dict[str, str]) -> str:
    """Return the line of a generated text, cut to `SAMPLE_CHARACTERS`."""
    text = sample["prompt"] + sample["text"]
    shown = printable(text[:SAMPLE_CHARACTERS]) + ("..." if len(text) > SAMPLE_CHARACTERS else "")
    return f"step {step} | sample | {shown}"


def evaluation_line(step: int, results: dict[str, Any]) -> str:
    """Return the line of an evaluation: the average, and one metric of each task."""
    return " | ".join([f"step {step} | evaluation", *_evaluation_fields(results)])


def end_lines(
    run: RunConfig, counters: Counters, stopped: str | None, losses: Mapping[str, float]
) -> Sequence[str]:
    """Return the last lines of a run: its totals, and commands for the next steps."""
    outcome = "done" if stopped is None else f"stopped by {stopped}"
    fields = [f"run {run.name}", outcome, f"{counters.step} steps", f"{counters.tokens} tokens"]
    fields.append(format_duration(counters.elapsed_seconds))
    fields += validation_texts(losses)
    if stopped is not None:
        return [" | ".join([*fields, "rerun the same command to resume"])]
    directory = shlex.quote(str(run.output_dir))
    commands = [f"megagrow report {directory}"]
    if run.data.tokenizer is not None:
        commands.append(f"megagrow generate {directory} --interactive")
    return [" | ".join(fields), " | ".join([f"run {run.name}", "next", *commands])]


def validation_texts(losses: Mapping[str, float]) -> Iterator[str]:
    """Yield the loss of each validation set; a set that has no name is not named."""
    for name, loss in losses.items():
        shown = "" if losses.keys() == {UNNAMED_SET} else f"{name} "
        yield f"validation {shown}loss {loss:.4f}"


def _evaluation_fields(results: dict[str, Any]) -> Iterator[str]:
    """Yield the average, and for each task its accuracy or else its first metric."""
    if results["average"] is not None:
        yield f"average {results['average']:.3f}"
    for task, metrics in results["results"].items():
        names = [name for name in ("acc_norm", "acc", *metrics) if name in metrics]
        yield from (f"{task} {name} {metrics[name]:.4g}" for name in names[:1])


def _layout(stage: StageConfig, world_size: int) -> str:
    return stage.parallel.layout_text(world_size)


def _shape(model: ModelConfig) -> str:
    """Return the paper's notation for a model's depth and width: `24L2048H`."""
    return f"{model.num_hidden_layers}L{model.hidden_size}H"
