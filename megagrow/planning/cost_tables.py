"""Tables of costs and of FLOPs by part, with the factors used."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from megagrow.common.sizes import format_duration, format_short
from megagrow.config.growth_guidelines import SPEEDUPS
from megagrow.config.schema import ModelConfig, StageConfig
from megagrow.model.layers.flops import (
    flops_per_token,
    norm_parameters,
    paper_flops_per_token,
)
from megagrow.model.layers.table import EMBEDDING, HEAD, block_counts, distinct_blocks
from megagrow.planning.costs import KG_CO2_PER_KWH, PUE, Cost, RunCosts


def cost_columns(costs: RunCosts) -> list[str]:
    """Return the column names: stages, their total if there are several, and training from scratch.

    The last model from scratch has two columns, for both ends of the paper's speedups.
    """
    stages = [f"stage {index}" for index in range(len(costs.stages))]
    scratch = [f"scratch at +{speedup:.0%}" for speedup in SPEEDUPS] if costs.scratch else []
    return stages + ["total"] * (len(stages) > 1) + scratch


def cost_rows(costs: RunCosts) -> Mapping[str, Sequence[str]]:
    """Return rows with the cells of `cost_columns`, without rows whose factor is unknown."""
    shown = [
        *costs.stages,
        *([costs.total] if len(costs.stages) > 1 else []),
        *(costs.scratch or ()),
    ]
    formats: dict[str, Callable[[Cost], str | None]] = {
        "tokens": lambda cost: format_short(cost.tokens),
        "tokens per second": lambda cost: f"{cost.tokens_per_second:,.0f}",
        "time": lambda cost: format_duration(cost.seconds),
        "GPU-hours": lambda cost: _amount(cost.gpu_hours),
        "energy, kWh": lambda cost: None if cost.kwh is None else _amount(cost.kwh),
        "CO2, kg": lambda cost: None if cost.co2_kg is None else _amount(cost.co2_kg),
        "price": lambda cost: None if cost.price is None else f"{cost.price:,.2f}",
    }
    rows = {name: [text(cost) for cost in shown] for name, text in formats.items()}
    return {name: [cell or "" for cell in cells] for name, cells in rows.items() if all(cells)}


def cost_summary(costs: RunCosts) -> tuple[str, list[str]]:
    """Return the time of a run, and its other costs as a list."""
    total = costs.total
    pace = f"{format_short(total.tokens_per_second)} tokens/s, {costs.pace.source}"
    others = [f"{_amount(total.gpu_hours)} GPU-hours"]
    if total.kwh is not None:
        others.append(f"{_amount(total.kwh)} kWh")
    if total.price is not None:
        others.append(f"price {total.price:,.2f}")
    return f"{format_duration(total.seconds)} ({pace})", others


def cost_lines(costs: RunCosts) -> Iterator[str]:
    """Yield the assumptions behind the figures."""
    factors = costs.factors
    yield (
        f"Pace: {costs.pace.flops_per_second:.3e} FLOP/s of all ranks: {costs.pace.source}. "
        "Growths, checkpoints and validation are not included."
    )
    if factors.watts is None:
        yield "Energy: unknown; pass the power of a GPU with --watts."
        return
    pue = " (assumed)" if factors.pue == PUE else ""
    co2 = " (assumed: the world's average of 2023)" if factors.co2 == KG_CO2_PER_KWH else ""
    yield (
        f"Energy: {factors.watts:,.0f} W per GPU throughout, hosts excluded, times a PUE of "
        f"{factors.pue:g}{pue}; {factors.co2:g} kg of CO2 per kWh{co2}."
    )


def _amount(value: float) -> str:
    """Return a value with one decimal, or below 1 with two digits."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


FlopsParts = Mapping[str, tuple[int, int]]
"""Part -> training FLOPs per token: computed, and by the paper's account."""


def flops_parts(model: ModelConfig, sequence_length: int) -> FlopsParts:
    """Return the FLOPs of each part of a model, and their total as "all".

    The computed FLOPs are those of matrix products (`flops_per_token`); an embedding lookup has
    none. The paper's account counts 6 per parameter and none for attention scores. It counts a
    tied embedding table once; the table is listed as the head.
    """
    parts: dict[str, tuple[int, int]] = {}
    counts = block_counts(model)
    for block in distinct_blocks(model):
        kind, count = block.type, counts[block]
        _add(parts, kind.label, count * kind.matmul_flops(model), 6 * count * kind.numel(model))
        if kind.score_label:
            _add(parts, kind.score_label, count * kind.score_flops(model, sequence_length), 0)
    table = 6 * EMBEDDING.numel(model)
    return parts | {
        "head": (HEAD.matmul_flops(model), table),
        "embedding": (0, 0 if model.tie_word_embeddings else table),
        "norms": (0, 6 * norm_parameters(model)),
        "all": (flops_per_token(model, sequence_length), paper_flops_per_token(model)),
    }


def _add(parts: dict[str, tuple[int, int]], label: str, computed: int, paper: int) -> None:
    before = parts.get(label, (0, 0))
    parts[label] = (before[0] + computed, before[1] + paper)


def flops_rows(stages: Sequence[StageConfig]) -> Mapping[str, Sequence[str]]:
    """Return, by part and stage, computed FLOPs per token, their share, and the paper's account."""
    each = [flops_parts(stage.model, stage.data.sequence_length) for stage in stages]
    names = dict.fromkeys(part for parts in each for part in parts)
    return {part: [_cell(parts, part) for parts in each] for part in names}


def _cell(parts: FlopsParts, part: str) -> str:
    done, paper = parts[part]
    return f"{done:.3e} ({done / parts['all'][0]:.1%}) / {paper:.3e}"
