"""Tables of a predicted run: times, parts of a step, and layouts that fit."""

from collections.abc import Iterator, Mapping, Sequence

from megagrow.common.sizes import format_duration, format_in, format_short
from megagrow.planning.layouts import (
    LEAST_TOKENS,
    MOST_CHUNKS,
    MOST_PIPELINE_RANKS,
    FittingLayout,
)
from megagrow.planning.memory_fit import USABLE
from megagrow.planning.prediction import RunPrediction, StagePrediction
from megagrow.planning.step.timing import StepTime

PARTS = {
    "matrix products": "matmul",
    "attention": "attention",
    "norms, activations, loss (memory-bound)": "memory_bound",
    "tensor-parallel collectives": "tensor_parallel",
    "context-parallel collectives": "context_parallel",
    "pipeline transfers": "pipeline_transfers",
    "pipeline bubble": "pipeline_bubble",
    "ZeRO, exposed": "zero_exposed",
    "ZeRO, cost of the overlapped part": "hidden_cost",
    "optimizer": "optimizer",
}
"""Row label -> field of `StepTime`; the fields add up to the step."""


def prediction_rows(prediction: RunPrediction) -> Mapping[str, Sequence[str]]:
    """Return table rows with one cell per stage."""
    stages = prediction.stages
    rows = {
        "micro-batches per step": [_micro(stage.step) for stage in stages],
        "step, s": [f"{stage.step.seconds:.3f}" for stage in stages],
        "tokens/s per GPU": [f"{stage.step.tokens_per_gpu:,.0f}" for stage in stages],
        "tokens/s, all GPUs": [format_short(stage.tokens_per_second) for stage in stages],
        "MFU": [f"{stage.step.mfu:.1%}" for stage in stages],
        "time": [format_duration(stage.seconds) for stage in stages],
    }
    for label, field in PARTS.items():
        cells = [_part(stage.step, getattr(stage.step, field)) for stage in stages]
        if any(getattr(stage.step, field) for stage in stages):
            rows[f"... {label}, ms"] = cells
    if any(stage.step.zero_hidden for stage in stages):
        rows["ZeRO overlapped with computation (not in the sum), ms"] = [
            f"{stage.step.zero_hidden * 1000:.1f}" for stage in stages
        ]
    if any(stage.growth_seconds for stage in stages):
        rows["growth before the stage, s"] = [_growth(stage) for stage in stages]
    return rows


def prediction_lines(prediction: RunPrediction) -> Iterator[str]:
    """Yield the cluster figures and a reference to the accuracy of the predictions."""
    cluster, card = prediction.cluster, prediction.cluster.card
    yield (
        f"Predicted for {cluster.nodes:,} x {cluster.gpus_per_node} {cluster.gpu.name}: "
        f"{card.hbm / 1e9:,.0f} GB/s of memory, {card.nvlink / 1e9:,.0f} GB/s to other cards of "
        f"the node, {card.nic / 1e9:,.0f} GB/s to other nodes, per card and direction. Accuracy: "
        "docs/results/scaling.md."
    )


LAYOUT_COLUMNS = ("tokens/s per GPU", "MFU", "memory, GiB", "step, s")


def layout_rows(layouts: Sequence[FittingLayout]) -> Mapping[str, Sequence[str]]:
    """Return one row per layout, fastest first, with the cells of `LAYOUT_COLUMNS`."""
    return {_layout(each): _layout_cells(each) for each in layouts}


def layout_line(layouts: Sequence[Sequence[FittingLayout]]) -> str:
    """Return a line that states the search space of the layouts."""
    shown = max(len(each) for each in layouts)
    return (
        f"The {shown} fastest layouts that use at most {USABLE:.0%} of the memory; tensor "
        "parallelism within a node, with sequence parallelism; pipelines of up to "
        f"{MOST_PIPELINE_RANKS} ranks and {MOST_CHUNKS} chunks per rank; at least "
        f"{LEAST_TOKENS:,} tokens per context-parallel rank; global batch unchanged."
    )


def _layout(each: FittingLayout) -> str:
    parallel = each.stage.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size
    name = parallel.layout_text(each.step.work.gpus) + (f", {chunks} chunks" * (chunks > 1))
    setting = parallel.activation_checkpointing
    checkpointing = setting if setting == "none" else f"{setting} checkpointing"
    return f"{name}, {checkpointing}, micro-batch {each.step.work.micro_batch}"


def _layout_cells(each: FittingLayout) -> list[str]:
    step = each.step
    return [
        f"{step.tokens_per_gpu:,.0f}",
        f"{step.mfu:.1%}",
        format_in(each.bytes_per_gpu, "GiB", 1),
        f"{step.seconds:.3f}",
    ]


def _micro(step: StepTime) -> str:
    work = step.work
    return f"{work.accumulation:,} x {work.micro_batch} sequences"


def _part(step: StepTime, seconds: float) -> str:
    return f"{seconds * 1000:.1f} ({seconds / step.seconds:.1%})"


def _growth(stage: StagePrediction) -> str:
    return "" if stage.growth_seconds is None else f"{stage.growth_seconds:.1f}"
