"""Tables of a run's plan, its expected saving, and warnings."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console

from megagrow.common.sizes import format_bytes, format_in, format_short
from megagrow.common.tables import print_lines, print_table
from megagrow.config.growth_guidelines import SPEEDUPS, TOKENS_OF_WARM_STARTS
from megagrow.config.schema import StageConfig
from megagrow.config.stage import BatchConfig
from megagrow.growth.validation import candidates
from megagrow.planning.cluster_tables import (
    LAYOUT_COLUMNS,
    layout_line,
    layout_rows,
    prediction_lines,
    prediction_rows,
)
from megagrow.planning.cost_tables import (
    cost_columns,
    cost_lines,
    cost_rows,
    cost_summary,
    flops_rows,
)
from megagrow.planning.costs import RunCosts
from megagrow.planning.memory import StageMemory
from megagrow.planning.memory_fit import USABLE
from megagrow.planning.planner import GrowthPlan, RunPlan, StagePlan
from megagrow.planning.request import PlanResult
from megagrow.reshard.traffic import TotalVolume

Rows = Mapping[str, Sequence[str]]
"""Row label -> one cell per stage or growth."""


MEMORY_LABELS = {
    "state": "fp32 masters and moments",
    "weights": "forward weights",
    "gathered": "weights gathered, at most",
    "gradients": "gradients",
    "buckets": "reduction buckets",
    "activations": "activations",
    "activations_selective": "... with selective checkpointing",
    "activations_full": "... with full checkpointing",
    "logits": "head and loss",
    "at_loss": "total at the loss",
    "at_end": "total at the end of the backward pass",
    "peak": "peak",
}
"""Key of `StageMemory.parts` -> row label."""


def print_plan(result: PlanResult, console: Console) -> None:
    """Print the result of `megagrow plan`: three lines of summary, then the details."""
    title = f"{result.plan.run.name} on {_ranks(result.plan.world_size)}"
    print_lines(console, [title, *summary_lines(result), ""])
    _print_details(result.plan, console, result.costs)
    stages = [f"stage {index}" for index in range(len(result.plan.stages))]
    if result.prediction is not None:
        _print(console, "On the cluster", stages, prediction_rows(result.prediction))
        print_lines(console, prediction_lines(result.prediction))
    for stage, layouts in zip(stages, result.layouts, strict=False):
        _print(console, f"Layouts of {stage}", LAYOUT_COLUMNS, layout_rows(layouts))
    if result.layouts:
        print_lines(console, [layout_line(result.layouts)])
    print_lines(console, result.data)


def summary_lines(result: PlanResult) -> tuple[str, str, str]:
    """Return memory, time and cost of a run, each as one line."""
    tokens = format_short(sum(stage.tokens for stage in result.plan.stages))
    amounts = [f"{tokens} tokens", f"{result.plan.flops:.3g} FLOPs"]
    time = "unknown; pass --cluster, or --gpu and --mfu"
    if result.costs is not None:
        time, costs = cost_summary(result.costs)
        amounts = costs + amounts
    return _memory_line(result), f"time: {time}", f"cost: {', '.join(amounts)}"


def _memory_line(result: PlanResult) -> str:
    peak, capacity = result.plan.peak, result.capacity
    stage = f"stage {peak.stage}"
    grows = result.plan.stages[peak.stage].growth is not None
    event = f"{'growth' if grows else 'transition'} before {stage}"
    place = event if peak.rank is None else f"{stage}, rank {peak.rank}"
    if capacity is None:
        size = format_bytes(peak.size)
        return f"memory: {size} per rank ({place}); pass --gpu to compare it with a GPU"
    line = f"{format_in(peak.size, 'GiB', 1)} of {format_in(capacity, 'GiB', 1)} GiB ({place})"
    if not result.fits:
        return f"does not fit: {line}; remedies: see the warnings below"
    if peak.size > USABLE * capacity:
        reserved = f"{1 - USABLE:.0%} of the memory"
        return f"fits barely: {line}; driver, NCCL and fragmentation take about {reserved}"
    return f"fits: {line}"


def _print_details(plan: RunPlan, console: Console, costs: RunCosts | None) -> None:
    """Print a plan; as plain Markdown tables if the output is not a terminal."""
    stages = [f"stage {index}" for index in range(len(plan.stages))]
    _print(console, "Stages", stages, stage_rows(plan.stages))
    flops = flops_rows([stage.config for stage in plan.stages])
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
    assumptions = [] if costs is None else list(cost_lines(costs))
    print_lines(console, [*assumptions, *closing_lines(plan)])


def stage_rows(stages: Sequence[StagePlan]) -> Rows:
    """Return rows of sizes, lengths, learning rates, FLOPs and layouts."""
    return {
        "model": [_model(stage.config) for stage in stages],
        "parameters": [f"{stage.parameters:,}" for stage in stages],
        "non-embedding parameters": [f"{stage.non_embedding:,}" for stage in stages],
        "tokens": [f"{stage.tokens:,}{_given(stage.config)}" for stage in stages],
        "tokens per step": [f"{stage.step_tokens:,}" for stage in stages],
        "micro-batch size": [_micro_batch(stage.config.batch) for stage in stages],
        "sequence length": [f"{stage.config.data.sequence_length:,}" for stage in stages],
        "steps": [f"{stage.steps:,}" for stage in stages],
        "FLOPs (6 x parameters x tokens)": [f"{stage.flops:.3e}" for stage in stages],
        "FLOPs, true (with attention, without embedding)": [
            f"{stage.flops_true:.3e}" for stage in stages
        ],
        "learning rate": [_rate(stage) for stage in stages],
        "layout": [_layout(stage.memory) for stage in stages],
    }


def memory_rows(memories: Sequence[StageMemory]) -> Rows:
    """Return rows of memory by part, and of both candidates for the peak of a step."""
    parts = [memory.parts for memory in memories]
    held = {label: [sizes[part] for sizes in parts] for part, label in MEMORY_LABELS.items()}
    rows = {label: [_gib(size) for size in sizes] for label, sizes in held.items() if any(sizes)}
    kernels = [memory.stage.kernels for memory in memories]
    settings = [memory.stage.parallel.activation_checkpointing for memory in memories]
    return rows | {
        "activation_checkpointing": [str(setting) for setting in settings],
        "logits in chunks": ["yes" if each.linear_cross_entropy else "no" for each in kernels],
    }


def growth_rows(growths: Sequence[GrowthPlan]) -> Rows:
    """Return rows of each growth's properties and peak memory."""
    return {
        "operator": [
            " or ".join(" + ".join(each.operator) for each in candidates(growth.options))
            for growth in growths
        ],
        "growth factor g": [f"{growth.factor:.2f}" for growth in growths],
        "connection rate Rc": [f"{growth.connection_rate:.1%}" for growth in growths],
        "Adam's moments": [growth.state for growth in growths],
        "learning rate": [growth.options.lr_schedule for growth in growths],
        "base tokens recommended by equation 2": [_advice(growth) for growth in growths],
        "peak memory per rank, GiB": [_gib(growth.peak_bytes) for growth in growths],
        "moved between ranks, GB": [_moved(growth.volume, "between_ranks") for growth in growths],
        "moved between pipeline ranks, GB": [
            _moved(growth.volume, "between_pipeline_ranks") for growth in growths
        ],
    }


def _moved(volume: TotalVolume | None, part: str) -> str:
    """Return bytes of a growth; above `SAMPLED_RANKS` ranks they are an estimate."""
    if volume is None:
        return "unknown before the operator is learned"
    size = format_in(getattr(volume, part), "GB", 3)
    return size if volume.is_exact else f"about {size}"


def closing_lines(plan: RunPlan) -> list[str]:
    """Return the FLOPs of the bases, the expected saving by the paper, and the warnings."""
    last = len(plan.stages) - 1
    lines: list[str] = []
    if any(stage.growth for stage in plan.stages):
        before = sum(stage.flops for stage in plan.stages[:last])
        lines.append(
            f"The stages before stage {last} are charged in full: {before:.3e} FLOPs, "
            f"{before / plan.flops:.1%} of the total."
        )
        lines += [*_saving_lines(plan), _budget_line(plan)]
    if plan.run.precision == "auto":
        lines.append("Memory is planned for bf16, the value of precision auto on a GPU.")
    return [*lines, *(f"Warning: {text}" for text in plan.warnings)]


def _budget_line(plan: RunPlan) -> str:
    last = plan.stages[-1]
    ratio = last.tokens / last.non_embedding
    return (
        f"Tokens per parameter of the last model: {ratio:.0f}. A study of warm starts found the "
        f"largest gains below {TOKENS_OF_WARM_STARTS}, and smaller ones with more tokens (arXiv "
        "2605.13405)."
    )


def _saving_lines(plan: RunPlan) -> Iterator[str]:
    low, high = SPEEDUPS
    measured = f"The paper measured speedups of {low:.0%} to {high:.0%}"
    if plan.saving is None:
        yield (
            f"Saving: unknown. {measured} for one growth by stacking, but has no figures for the "
            "growths of this run."
        )
        return
    scratch, target = plan.saving.scratch_flops, plan.stages[-1]
    at = [format_short(flops / (6 * target.parameters)) for flops in scratch]
    growth = target.growth
    factor = f"{growth.factor:.2f}" if growth else ""
    yield (
        f"Expected saving (by the paper, not measured here): {measured} by Gstack at g = 4 (this "
        f"run: g = {factor}), with d tokens of the base counted as d / g. If they hold here, the "
        f"last model from scratch needs {scratch[0]:.3e} to {scratch[1]:.3e} FLOPs ({at[0]} to "
        f"{at[1]} tokens) for the same loss, and this run saves {_range(plan.saving.saved)} of "
        f"them: a speedup of {_range(plan.saving.speedup)} with the base charged in full."
    )


def _print(console: Console, title: str, columns: Sequence[str], rows: Rows) -> None:
    above, corner = (title, "") if console.is_terminal else (None, title)
    cells = ((label, *values) for label, values in rows.items())
    print_table(console, (corner, *columns), cells, title=above)


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1%} to {pair[1]:.1%}"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count:,} ranks"


def _model(stage: StageConfig) -> str:
    model = stage.model
    heads = f"{model.num_attention_heads}/{model.num_key_value_heads} heads"
    types = dict.fromkeys(model.layer_types)
    of_types = f" ({', '.join(types)})" if len(types) > 1 else ""
    return f"{model.num_hidden_layers} layers{of_types} x {model.hidden_size}, {heads}"


def _given(stage: StageConfig) -> str:
    """Return the run file's stage length if it is not given in tokens."""
    if stage.tokens_auto:
        return " (auto)"
    if stage.at_tokens is not None:
        return f" (at_tokens {format_short(stage.at_tokens)})"
    return f" (at_flops {stage.at_flops:.3g})" if stage.at_flops is not None else ""


def _micro_batch(batch: BatchConfig) -> str:
    return f"{batch.micro_batch_size}{' (auto)' if batch.micro_batch_size_auto else ''}"


def _rate(stage: StagePlan) -> str:
    rates = f"{stage.optimizer.lr:.2e} to {stage.optimizer.min_lr:.2e}"
    return f"{stage.config.schedule.type}, {rates}"


def _layout(memory: StageMemory) -> str:
    return memory.stage.parallel.layout_text(memory.layout.world_size)


def _advice(growth: GrowthPlan) -> str:
    advised = format_short(growth.advised_tokens)
    return f"{advised}, outside its fit: {growth.outside_fit}" if growth.outside_fit else advised


def _gib(size: int) -> str:
    return format_in(size, "GiB", 3)
