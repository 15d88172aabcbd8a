"""Ablation of growth variants over several seeds: Markdown tables, JSON and a plot."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megagrow.analysis.growth_transient import (
    CurvePoint,
    GrowthTransient,
    Spread,
    paired_spread,
    spread,
)
from megagrow.analysis.plots import GREY, PLOT_STYLES, PlotStyle, set_grid
from megagrow.common.tables import markdown_table


class Variant(NamedTuple):
    """Policy for Adam's moments and learning-rate schedule."""

    policy: str
    schedule: str

    def __str__(self) -> str:
        return f"{self.policy}, {self.schedule}"


Quantity = Callable[[GrowthTransient], float | None]

QUANTITIES: dict[str, Quantity] = {
    "spike": lambda run: run.spike,
    "highest excess": lambda run: run.excess,
    "tokens to recover": lambda run: run.recovery,
    "loss at 1/4": lambda run: run.quarter,
    "loss at 1/2": lambda run: run.half,
    "loss at the end": lambda run: run.end,
}
NOT_COMPARED = "spike"
"""Excluded from comparisons: no policy changes the weights at the growth."""


@dataclass(frozen=True)
class Study:
    """Runs of all variants and the baseline from scratch, all in the order of `seeds`."""

    seeds: tuple[int, ...]
    runs: Mapping[Variant, tuple[GrowthTransient, ...]]
    scores: Mapping[str, Mapping[Variant, tuple[float, ...]]]
    """Additional quantities, measured on saved models."""
    scratch: Mapping[str, tuple[float, ...]]
    """Quantities of the large model trained from scratch with equal FLOPs."""

    @property
    def quantities(self) -> list[str]:
        """Names of all quantities in the tables."""
        return [*QUANTITIES, *self.scores]

    def values(self, variant: Variant, quantity: str) -> list[float | None]:
        """Return one quantity of a variant, one value per seed."""
        if quantity in self.scores:
            return list(self.scores[quantity][variant])
        return [QUANTITIES[quantity](run) for run in self.runs[variant]]

    def difference(self, variant: Variant, other: Variant, quantity: str) -> Spread | None:
        """Return the spread of `variant - other`, paired by seed."""
        return paired_spread(self.values(variant, quantity), self.values(other, quantity))


def markdown(study: Study, reference: Variant) -> str:
    """Return the tables as Markdown.

    They contain the values, the differences to `reference`, and the differences to the policy of
    `reference` under each of the other schedules.
    """
    tables = [_values(study), *_differences(study, reference, list(study.runs))]
    for schedule in dict.fromkeys(variant.schedule for variant in study.runs):
        other = Variant(reference.policy, schedule)
        if other != reference:
            same = [variant for variant in study.runs if variant.schedule == schedule]
            tables += _differences(study, other, same)
    return "\n\n".join(tables) + "\n"


def _values(study: Study) -> str:
    names = study.quantities
    rows = [
        [str(variant), *(_value_cell(spread(study.values(variant, name)), name) for name in names)]
        for variant in study.runs
    ]
    baseline = [
        _value_cell(spread(study.scratch[name]), name) if name in study.scratch else "-"
        for name in names
    ]
    rows.append(["from scratch, equal FLOPs", *baseline])
    return _table(["mean \u00b1 standard deviation", *names], rows)


def _differences(study: Study, other: Variant, variants: Sequence[Variant]) -> list[str]:
    names = [name for name in study.quantities if name != NOT_COMPARED]
    rows = [
        [
            str(variant),
            *(_difference_cell(study.difference(variant, other, name), name) for name in names),
        ]
        for variant in variants
        if variant != other
    ]
    head = f"difference to `{other}`, paired by seed; mean \u00b1 95% interval"
    return [_table([head, *names], rows)] if rows else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(head, rows, right_aligned=head[1:])


def _value_cell(value: Spread | None, quantity: str) -> str:
    if value is None:
        return "not in all runs"
    return _with_error(value.mean, value.deviation, quantity)


def _difference_cell(value: Spread | None, quantity: str) -> str:
    """Format a difference; in bold if its 95% interval excludes zero."""
    if value is None:
        return "-"
    text = _with_error(value.mean, value.margin, quantity, sign="+")
    return f"**{text}**" if value.is_clear else text


def _with_error(mean: float, error: float, quantity: str, sign: str = "") -> str:
    if quantity.startswith("tokens"):
        return f"{mean / 1e3:{sign}.1f}K \u00b1 {error / 1e3:.1f}K"
    return f"{mean:{sign}.3f} \u00b1 {error:.3f}"


def as_json(study: Study) -> str:
    """Return the numbers of every run as JSON; lists are in the order of the seeds."""
    runs = {str(variant): [asdict(run) for run in runs] for variant, runs in study.runs.items()}
    scores = {
        name: {str(variant): values for variant, values in by_variant.items()}
        for name, by_variant in study.scores.items()
    }
    document = {"seeds": study.seeds, "runs": runs, "scores": scores, "scratch": study.scratch}
    return json.dumps(document) + "\n"


def plot(study: Study, reference: Variant, path: Path) -> None:
    """Write a PNG of the validation loss after the growth.

    There is one panel per schedule, and a last panel with the difference of each variant to
    `reference`. Bands are one standard deviation over the seeds; in the last panel, of the
    paired differences. Policies differ in color (Okabe and Ito) and marker, schedules in line
    style.
    """
    schedules = list(dict.fromkeys(variant.schedule for variant in study.runs))
    figure = Figure(figsize=(13, 5), dpi=80, layout="constrained")
    panels = figure.subplots(1, len(schedules) + 1)
    difference_panel = panels[-1]
    base = [run.validation for run in study.runs[reference]]
    for variant, style in _styles(study).items():
        curves = [run.validation for run in study.runs[variant]]
        _band(panels[schedules.index(variant.schedule)], curves, style, str(variant))
        _band(difference_panel, list(map(_subtract, curves, base)), style, str(variant))
    for axes, schedule in zip(panels, schedules, strict=False):
        before = statistics.fmean(run.before for run in study.runs[reference])
        axes.axhline(before, color=GREY, lw=1.0, ls=":", label="before the growth")
        _draw_scratch(axes, study.scratch["loss at the end"], base[0][-1][0])
        axes.set(title=schedule, ylabel="validation loss (nats per token)")
        axes.sharey(panels[0])
    difference_panel.set_title(f"difference to `{reference}`, paired by seed")
    for axes in panels:
        axes.set_xlabel("thousand tokens since the growth")
        set_grid(axes)
        axes.legend(frameon=False, fontsize=8, handlelength=4)
    figure.savefig(path)


def _draw_scratch(axes: Axes, ends: Sequence[float], tokens: float) -> None:
    value = spread(ends)
    assert value is not None
    axes.errorbar(
        tokens / 1e3,
        value.mean,
        value.deviation,
        fmt="X",
        color="black",
        capsize=3,
        label="from scratch, equal FLOPs",
    )


def _styles(study: Study) -> dict[Variant, PlotStyle]:
    policies = list(dict.fromkeys(variant.policy for variant in study.runs))
    schedules = list(dict.fromkeys(variant.schedule for variant in study.runs))
    lines = ("-", (0, (4, 2)), (0, (1, 1)))
    return {
        variant: PLOT_STYLES[policies.index(variant.policy)]._replace(
            line=lines[schedules.index(variant.schedule)]
        )
        for variant in study.runs
    }


def _subtract(curve: Sequence[CurvePoint], other: Sequence[CurvePoint]) -> list[CurvePoint]:
    return [(tokens, loss - base) for (tokens, loss), (_, base) in zip(curve, other, strict=True)]


def _band(axes: Axes, curves: Sequence[Sequence[CurvePoint]], style: PlotStyle, label: str) -> None:
    """Draw the mean and standard deviation of curves measured at the same token counts."""
    x = [tokens / 1e3 for tokens, _ in curves[0]]
    spreads = [spread(losses) for losses in zip(*([p[1] for p in c] for c in curves), strict=True)]
    means = [point.mean for point in spreads if point is not None]
    deviations = [point.deviation for point in spreads if point is not None]
    color, line, marker = style
    axes.plot(x, means, color=color, ls=line, marker=marker, lw=1.6, ms=4, label=label)
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    axes.fill_between(x, low, high, color=color, alpha=0.08, lw=0)
