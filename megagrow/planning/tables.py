"""The plan of a run as its user sees it: tables, what may be saved, and warnings."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from megagrow.common.sizes import format_in, format_short
from megagrow.common.tables import print_lines, print_table
from megagrow.config.growth_guidelines import SPEEDUPS
from megagrow.config.schema import StageConfig
from megagrow.growth.validation import candidates
from megagrow.planning.cluster_tables import (
    LAYOUT_COLUMNS,
    layout_line,
    layout_rows,
    prediction_lines,
    prediction_rows,
)
from megagrow.planning.cost_tables import cost_columns, cost_lines, cost_rows, flops_rows
from megagrow.planning.costs import RunCosts
from megagrow.planning.memory import StageMemory
from megagrow.planning.planner import GrowthPlan, RunPlan, StagePlan
from megagrow.planning.request import Answer

Rows = Mapping[str, Sequence[str]]
"""What is told -> one cell for each stage, or each growth."""


def show_answer(answer: Answer, console: Console) -> None:
    """Prints all that `megagrow plan` was asked."""
    show_plan(answer.plan, console, answer.costs)
    stages = [f"stage {index}" for index in range(len(answer.plan.stages))]
    if answer.prediction is not None:
        _print(console, "On the cluster", stages, prediction_rows(answer.prediction))
        print_lines(console, prediction_lines(answer.prediction))
    for stage, layouts in zip(stages, answer.layouts, strict=False):
        _print(console, f"Layouts of {stage}", LAYOUT_COLUMNS, layout_rows(layouts))
    if answer.layouts:
        print_lines(console, [layout_line(answer.layouts)])


def show_plan(plan: RunPlan, console: Console, costs: RunCosts | None = None) -> None:
    """Prints a plan; where the output is no terminal as plain Markdown tables."""
    stages = [f"stage {index}" for index in range(len(plan.stages))]
    console.print(Text(f"{plan.run.name} on {_ranks(plan.world_size)}"))
    _print(console, "Stages", stages, stage_rows(plan.stages))
    length = plan.run.data.sequence_length
    flops = flops_rows([stage.config.model for stage in plan.stages], length)
    _print(console, "FLOPs per token, true (share) / the paper's", stages, flops)
    memories = [stage.memory for stage in plan.stages]
    _print(console, "Memory per rank, GiB", stages, memory_rows(memories))
    growths = [(index, stage.growth) for index, stage in enumerate(plan.stages)]
    grown = [(f"{index - 1} -> {index}", growth) for index, growth in growths if growth]
    if grown:
        rows = growth_rows([growth for _, growth in grown])
        _print(console, "Growths", [name for name, _ in grown], rows)
    if costs is not None:
        _print(console, "Costs", cost_columns(costs), cost_rows(costs))
    told = [] if costs is None else list(cost_lines(costs))
    print_lines(console, [*told, *closing_lines(plan)])


def stage_rows(stages: Sequence[StagePlan]) -> Rows:
    """Sizes, lengths, rates, FLOPs and layouts."""
    return {
        "model": [_model(stage.config) for stage in stages],
        "parameters": [f"{stage.parameters:,}" for stage in stages],
        "outside the embeddings": [f"{stage.non_embedding:,}" for stage in stages],
        "tokens": [f"{stage.tokens:,}{_given(stage.config)}" for stage in stages],
        "tokens a step": [f"{stage.step_tokens:,}" for stage in stages],
        "steps": [f"{stage.steps:,}" for stage in stages],
        "FLOPs (6 x parameters x tokens)": [f"{stage.flops:.3e}" for stage in stages],
        "FLOPs, true (attention in, embedding out)": [
            f"{stage.flops_true:.3e}" for stage in stages
        ],
        "learning rate": [_rate(stage) for stage in stages],
        "layout": [_layout(stage.memory) for stage in stages],
    }


def memory_rows(memories: Sequence[StageMemory]) -> Rows:
    """Memory by part, and the two moments of a step that can be its highest."""
    parts = {
        "fp32 masters and moments": [memory.state for memory in memories],
        "forward weights": [memory.weights for memory in memories],
        "weights gathered, at most": [memory.gathered for memory in memories],
        "gradients": [memory.gradients for memory in memories],
        "buckets that reduce them": [memory.buckets for memory in memories],
        "activations": [memory.activations for memory in memories],
        "... with full checkpointing": [memory.activations_checkpointed for memory in memories],
        "head and loss": [memory.logits for memory in memories],
        "all at the loss": [memory.at_loss for memory in memories],
        "all at the end of a backward pass": [memory.at_end for memory in memories],
        "the larger of the two": [memory.training for memory in memories],
    }
    rows = {part: [_gib(size) for size in held] for part, held in parts.items() if any(held)}
    kernels = [memory.stage.kernels for memory in memories]
    asked = [memory.stage.parallel.activation_checkpointing for memory in memories]
    return rows | {
        "activation_checkpointing": [str(setting) for setting in asked],
        "logits in chunks": ["yes" if each.linear_cross_entropy else "no" for each in kernels],
    }


def growth_rows(growths: Sequence[GrowthPlan]) -> Rows:
    """What each growth does, and what it holds in memory."""
    return {
        "operator": [
            " or ".join(" + ".join(each.operator) for each in candidates(growth.options))
            for growth in growths
        ],
        "growth factor g": [f"{growth.factor:.2f}" for growth in growths],
        "connection rate Rc": [f"{growth.connection_rate:.1%}" for growth in growths],
        "Adam's moments": [growth.state for growth in growths],
        "learning rate": [growth.options.lr_schedule for growth in growths],
        "base tokens that equation 2 advises": [_advice(growth) for growth in growths],
        "peak memory per rank, GiB": [_gib(growth.peak_bytes) for growth in growths],
    }


def closing_lines(plan: RunPlan) -> list[str]:
    """The sum, the saving that the paper's figures promise, and the warnings."""
    last = len(plan.stages) - 1
    tokens = sum(stage.tokens for stage in plan.stages)
    lines = [f"In all {tokens:,} tokens and {plan.flops:.3e} FLOPs (6 x parameters x tokens)."]
    if last:
        before = sum(stage.flops for stage in plan.stages[:last])
        lines.append(
            f"What comes before stage {last} is charged in full: {before:.3e} FLOPs, "
            f"{before / plan.flops:.1%} of them."
        )
        lines += _saving_lines(plan)
    if plan.run.precision == "auto":
        lines.append("Memory is counted for bf16, as precision auto is on a GPU.")
    return [*lines, *(f"Warning: {text}" for text in plan.warnings)]


def _saving_lines(plan: RunPlan) -> Iterator[str]:
    low, high = SPEEDUPS
    measured = f"The paper measured speedups of {low:.0%} to {high:.0%}"
    if plan.saving is None:
        yield (
            f"Saving: unknown. {measured} for one growth by stacking; it has no such figures for "
            "the growths of this run."
        )
        return
    scratch, target = plan.saving.scratch_flops, plan.stages[-1]
    at = [format_short(flops / (6 * target.parameters)) for flops in scratch]
    growth = target.growth
    factor = f"{growth.factor:.2f}" if growth else ""
    yield (
        f"Saving, by the paper's measurement and not ours: {measured} by Gstack at g = 4 (this "
        f"run: g = {factor}), with d tokens of the base counted as d / g. If they hold here, its "
        f"last model from scratch needs {scratch[0]:.3e} to {scratch[1]:.3e} FLOPs ({at[0]} to "
        f"{at[1]} tokens) for the same loss, and this run saves {_range(plan.saving.saved)} of "
        f"them: a speedup of {_range(plan.saving.speedup)}, the base charged in full."
    )


def _print(console: Console, title: str, columns: Sequence[str], rows: Rows) -> None:
    above, corner = (title, "") if console.is_terminal else (None, title)
    cells = ((name, *values) for name, values in rows.items())
    print_table(console, (corner, *columns), cells, title=above)


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1%} to {pair[1]:.1%}"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count:,} ranks"


def _model(stage: StageConfig) -> str:
    model = stage.model
    heads = f"{model.num_attention_heads}/{model.num_key_value_heads} heads"
    return f"{model.num_hidden_layers} layers x {model.hidden_size}, {heads}"


def _given(stage: StageConfig) -> str:
    """How the run file gives the length, where it is not in tokens."""
    if stage.tokens_auto:
        return " (auto)"
    if stage.at_tokens is not None:
        return f" (at_tokens {format_short(stage.at_tokens)})"
    return f" (at_flops {stage.at_flops:.3g})" if stage.at_flops is not None else ""


def _rate(stage: StagePlan) -> str:
    rates = f"{stage.optimizer.lr:.2e} to {stage.optimizer.min_lr:.2e}"
    return f"{stage.config.schedule.type}, {rates}"


def _layout(memory: StageMemory) -> str:
    layout = memory.layout
    return f"ZeRO-{layout.zero_stage}, DP {layout.dp} x TP {layout.tp}"


def _advice(growth: GrowthPlan) -> str:
    advised = format_short(growth.advised_tokens)
    return f"{advised}, beyond its fit: {growth.outside_fit}" if growth.outside_fit else advised


def _gib(size: int) -> str:
    return format_in(size, "GiB", 3)
