"""Variants of a growth side by side, each with several seeds: a table, the numbers, a plot."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megagrow.analysis.growth_transient import Aftermath, CurvePoint, Spread, paired, spread
from megagrow.analysis.plots import GREY, LOOKS, Look
from megagrow.common.tables import markdown_table


class Variant(NamedTuple):
    """What was varied: the policy for Adam's moments, and the learning rate's schedule."""

    policy: str
    schedule: str

    def __str__(self) -> str:
        return f"{self.policy}, {self.schedule}"


Quantity = Callable[[Aftermath], float | None]

QUANTITIES: dict[str, Quantity] = {
    "spike": lambda run: run.spike,
    "highest excess": lambda run: run.excess,
    "tokens to recover": lambda run: run.recovery,
    "loss at 1/4": lambda run: run.quarter,
    "loss at 1/2": lambda run: run.half,
    "loss at the end": lambda run: run.end,
}
SAME_IN_ALL = "spike"
"""No policy changes the weights at the growth: this one is not compared."""


@dataclass(frozen=True)
class Study:
    """All runs, every variant's and the yardstick's in the same order of seeds."""

    seeds: tuple[int, ...]
    runs: Mapping[Variant, tuple[Aftermath, ...]]
    scores: Mapping[str, Mapping[Variant, tuple[float, ...]]]
    """Further quantities, measured on saved models."""
    scratch: Mapping[str, tuple[float, ...]]
    """Those quantities that the large model from scratch has, on equal FLOPs."""

    @property
    def quantities(self) -> list[str]:
        """All that is tabled."""
        return [*QUANTITIES, *self.scores]

    def values(self, variant: Variant, quantity: str) -> list[float | None]:
        """One quantity of a variant, a value per seed."""
        if quantity in self.scores:
            return list(self.scores[quantity][variant])
        return [QUANTITIES[quantity](run) for run in self.runs[variant]]

    def difference(self, variant: Variant, other: Variant, quantity: str) -> Spread | None:
        """variant - other, paired by seed."""
        return paired(self.values(variant, quantity), self.values(other, quantity))


def markdown(study: Study, reference: Variant) -> str:
    """The tables: values, differences from `reference`, and from its policy in every schedule."""
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
        [str(variant), *(_number(spread(study.values(variant, name)), name) for name in names)]
        for variant in study.runs
    ]
    yardstick = [
        _number(spread(study.scratch[name]), name) if name in study.scratch else "-"
        for name in names
    ]
    rows.append(["from scratch, equal FLOPs", *yardstick])
    return _table(["mean \u00b1 standard deviation", *names], rows)


def _differences(study: Study, other: Variant, variants: Sequence[Variant]) -> list[str]:
    names = [name for name in study.quantities if name != SAME_IN_ALL]
    rows = [
        [str(variant), *(_margin(study.difference(variant, other, name), name) for name in names)]
        for variant in variants
        if variant != other
    ]
    head = f"less `{other}`, paired by seed; mean \u00b1 95% interval"
    return [_table([head, *names], rows)] if rows else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(head, rows, right_aligned=head[1:])


def _number(value: Spread | None, quantity: str) -> str:
    if value is None:
        return "not in all runs"
    return _written(value.mean, value.deviation, quantity)


def _margin(value: Spread | None, quantity: str) -> str:
    """Differences whose 95% interval leaves out zero are in bold."""
    if value is None:
        return "-"
    text = _written(value.mean, value.margin, quantity, sign="+")
    return f"**{text}**" if value.is_clear else text


def _written(mean: float, around: float, quantity: str, sign: str = "") -> str:
    if quantity.startswith("tokens"):
        return f"{mean / 1e3:{sign}.1f}K \u00b1 {around / 1e3:.1f}K"
    return f"{mean:{sign}.3f} \u00b1 {around:.3f}"


def as_json(study: Study) -> str:
    """Every run's numbers; lists are in the order of the seeds."""
    runs = {str(variant): [asdict(run) for run in runs] for variant, runs in study.runs.items()}
    scores = {
        name: {str(variant): found for variant, found in by_variant.items()}
        for name, by_variant in study.scores.items()
    }
    whole = {"seeds": study.seeds, "runs": runs, "scores": scores, "scratch": study.scratch}
    return json.dumps(whole) + "\n"


def plot(study: Study, reference: Variant, path: Path) -> None:
    """Writes the curves to `path`: validation loss since the growth, a panel for each schedule, and
    last all variants less `reference`. Bands are one standard deviation over the seeds (last panel:
    of the differences).

    A policy has a colour (Okabe and Ito's) and a marker, a schedule a line style.
    """
    schedules = list(dict.fromkeys(variant.schedule for variant in study.runs))
    figure = Figure(figsize=(13, 5), dpi=80, layout="constrained")
    panels = figure.subplots(1, len(schedules) + 1)
    less = panels[-1]
    base = [run.validation for run in study.runs[reference]]
    for variant, look in _looks(study).items():
        curves = [run.validation for run in study.runs[variant]]
        _band(panels[schedules.index(variant.schedule)], curves, look, str(variant))
        _band(less, list(map(_less, curves, base)), look, str(variant))
    for axes, schedule in zip(panels, schedules, strict=False):
        before = statistics.fmean(run.before for run in study.runs[reference])
        axes.axhline(before, color=GREY, lw=1.0, ls=":", label="before the growth")
        _draw_scratch(axes, study.scratch["loss at the end"], base[0][-1][0])
        axes.set(title=schedule, ylabel="validation loss (nats per token)")
        axes.sharey(panels[0])
    less.set_title(f"less `{reference}` of the same seed")
    for axes in panels:
        axes.set_xlabel("thousand tokens since the growth")
        axes.grid(color="#DDDDDD", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, handlelength=4)
    figure.savefig(path)


def _draw_scratch(axes: Axes, ends: Sequence[float], tokens: float) -> None:
    found = spread(ends)
    assert found is not None
    axes.errorbar(
        tokens / 1e3,
        found.mean,
        found.deviation,
        fmt="X",
        color="black",
        capsize=3,
        label="from scratch, equal FLOPs",
    )


def _looks(study: Study) -> dict[Variant, Look]:
    policies = list(dict.fromkeys(variant.policy for variant in study.runs))
    schedules = list(dict.fromkeys(variant.schedule for variant in study.runs))
    lines = ("-", (0, (4, 2)), (0, (1, 1)))
    return {
        variant: LOOKS[policies.index(variant.policy)]._replace(
            line=lines[schedules.index(variant.schedule)]
        )
        for variant in study.runs
    }


def _less(curve: Sequence[CurvePoint], other: Sequence[CurvePoint]) -> list[CurvePoint]:
    return [(tokens, loss - base) for (tokens, loss), (_, base) in zip(curve, other, strict=True)]


def _band(axes: Axes, curves: Sequence[Sequence[CurvePoint]], look: Look, label: str) -> None:
    """Mean and deviation of curves that are measured at the same tokens."""
    at = [tokens / 1e3 for tokens, _ in curves[0]]
    found = [spread(losses) for losses in zip(*([p[1] for p in c] for c in curves), strict=True)]
    means = [point.mean for point in found if point is not None]
    around = [point.deviation for point in found if point is not None]
    colour, line, marker = look
    axes.plot(at, means, color=colour, ls=line, marker=marker, lw=1.6, ms=4, label=label)
    low = [mean - width for mean, width in zip(means, around, strict=True)]
    high = [mean + width for mean, width in zip(means, around, strict=True)]
    axes.fill_between(at, low, high, color=colour, alpha=0.08, lw=0)
