"""Plot of loss against FLOPs, tokens and time for several runs, and helpers for other plots.

Colors are the color-blind safe palette of Okabe and Ito. Line styles and markers also differ, so
plots are readable in black and white.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
)

from megagrow.analysis.curves import SMOOTHING, Growth, RunCurves, Series
from megagrow.analysis.speedup import Speedup
from megagrow.common.sizes import format_duration
from megagrow.errors import printable


class PlotStyle(NamedTuple):
    """Color, line style and marker of one run."""

    color: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str


PLOT_STYLES = (
    PlotStyle("#D55E00", "-", "o"),
    PlotStyle("#0072B2", (0, (5, 2)), "s"),
    PlotStyle("#009E73", (0, (6, 2, 1, 2)), "^"),
    PlotStyle("#CC79A7", (0, (1, 1)), "D"),
    PlotStyle("#E69F00", (0, (3, 1, 1, 1, 1, 1)), "v"),
    PlotStyle("#56B4E9", (0, (8, 3)), "P"),
    PlotStyle("#000000", (0, (2, 3)), "X"),
)
STEEP_SHARE = 0.06
"""Initial fraction of each run's tokens whose steep losses do not extend the loss axis."""
MAX_MARKERS = 16
LABEL_LENGTH = 60
"""Maximum characters of a legend entry."""
GREY, GRID_GREY = "#555555", "#DDDDDD"
MAX_POINTS = 800
"""Maximum points of a drawn curve; of a longer one, evenly spaced points are drawn."""
COST_LABELS = {
    "flops": "training FLOPs (6 N per token, base included)",
    "tokens": "tokens",
    "seconds": "training time",
}
"""Axis labels of the costs."""
TIME_STEPS = (
    *(1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 10800, 21600),
    *(43200, 86400, 172800, 432000, 864000, 1728000, 4320000),
)
"""Seconds between ticks of a time axis."""
MAX_TICKS = 6


@dataclass(frozen=True, slots=True)
class Panel:
    """Axes and their x quantity: `tokens`, `seconds`, or an account of `flop_accounting`."""

    axes: Axes
    x: str

    def series_x(self, run: RunCurves, series: Series) -> Sequence[float]:
        """Return the x values of a series of the run; the run must have the account."""
        if self.x == "flops_charged":
            return run.charged_flops(series.tokens) or ()
        return getattr(series, self.x)

    def growth_x(self, run: RunCurves, growth: Growth) -> float:
        """Return the x value of a growth of the run."""
        if self.x == "flops_charged":
            return (run.charged_flops((growth.tokens,)) or (0.0,))[0]
        return getattr(growth, self.x)


def plot_runs(
    runs: Sequence[RunCurves], path: Path, speedup: Speedup | None = None, log_x: bool = False
) -> None:
    """Write the plot of `runs` to `path` as a PNG.

    Growths are marked by a ring on the curve and a dotted line, `speedup` by a segment between the
    two points of equal loss. `log_x` makes the x axes logarithmic.
    """
    figure = Figure(figsize=(14, 4.8), dpi=150, layout="constrained")
    panels = list(figure.subplots(1, len(COST_LABELS), sharey=True))
    for axes, (x, label) in zip(panels, COST_LABELS.items(), strict=True):
        draw_panel(Panel(axes, x), runs, log_x)
        axes.set_xlabel(label)
    panels[0].set_ylabel("loss (nats per token)")
    if speedup is not None:
        draw_speedup(panels[0], speedup)
    panels[0].legend(frameon=False, loc="upper right")
    panels[-1].set_title(line_note(runs), fontsize=8, color=GREY, loc="right")
    figure.savefig(path)


def line_note(runs: Sequence[RunCurves]) -> str:
    """Return a note on the line widths and the smoothing."""
    trained = f"training, mean of the last {SMOOTHING:.0%} of tokens; faint: each step"
    validated = any(map(_validated, runs))
    return f"thick: validation; thin: {trained}" if validated else f"thick: {trained}"


def _validated(run: RunCurves) -> bool:
    return len(run.validation.loss) > 1


def draw_panel(panel: Panel, runs: Sequence[RunCurves], log_x: bool = False) -> None:
    """Draw the losses of all runs and mark their growths."""
    for index, run in enumerate(runs):
        _draw_run(panel, run, plot_style(index))
    format_axes(panel.axes, log_x)
    panel.axes.set_ylim(*_loss_range(runs))
    format_costs(panel.axes, panel.x)


def plot_style(index: int) -> PlotStyle:
    """Return the style of the run at this index; styles repeat after the seventh."""
    return PLOT_STYLES[index % len(PLOT_STYLES)]


def label_text(name: str) -> str:
    """Return a run's name as a label; matplotlib omits labels with a leading _ from legends.

    A long name is truncated, because a figure is as wide as its legend.
    """
    shown = printable(name)
    if len(shown) > LABEL_LENGTH:
        shown = f"{shown[: LABEL_LENGTH - 3]}..."
    plain = shown.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _draw_run(panel: Panel, run: RunCurves, style: PlotStyle) -> None:
    validated = _validated(run)
    thin = (
        {"linewidth": 0.9, "alpha": 0.7}
        if validated
        else {"linewidth": 1.8, "label": label_text(run.name)}
    )
    draw = panel.axes.plot
    x = panel.series_x(run, run.train)
    draw(*thinned(x, run.train_unsmoothed), color=style.color, lw=0.6, alpha=0.3)
    draw(*thinned(x, run.train.loss), color=style.color, ls=style.line, **thin)
    if validated:
        draw(
            panel.series_x(run, run.validation),
            run.validation.loss,
            color=style.color,
            ls=style.line,
            lw=1.9,
            marker=style.marker,
            ms=4.5,
            markevery=marker_slice(len(run.validation.loss)),
            label=label_text(run.name),
        )
    _draw_growths(panel, run, style)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return at most about `MAX_POINTS` points of a curve, with the last one."""
    step = -(-len(x) // MAX_POINTS) or 1
    kept = slice((len(x) - 1) % step, None, step)
    return x[kept], y[kept]


def marker_slice(points: int) -> slice:
    """Return the indices of the points with a marker: evenly spaced, including the last."""
    step = -(-points // MAX_MARKERS)
    return slice((points - 1) % step, None, step)


def _draw_growths(panel: Panel, run: RunCurves, style: PlotStyle) -> None:
    series = run.validation if _validated(run) else run.train
    for growth in run.growths:
        at = panel.growth_x(run, growth)
        before = _loss_before(series, growth.tokens)
        panel.axes.axvline(at, color=style.color, ls=":", lw=1.0)
        panel.axes.plot(at, before, "o", ms=9, mfc="none", mec=style.color, mew=1.5)
        late = growth.tokens > run.tokens / 2  # the losses are above the label, or below it
        panel.axes.annotate(
            f"\u2192 {_format_parameters(run.parameters[growth.stage])}",
            (at, 0.98 if late else 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(2, 0),
            textcoords="offset points",
            rotation="vertical",
            va="top" if late else "bottom",
            fontsize=7,
            color=style.color,
        )


def _loss_before(series: Series, tokens: int) -> float:
    """Return the last loss measured up to `tokens`, or the first loss of the series."""
    losses = [loss for at, loss in zip(series.tokens, series.loss, strict=True) if at <= tokens]
    return losses[-1] if losses else series.loss[0]


def draw_speedup(axes: Axes, speedup: Speedup) -> None:
    """Connect the points of equal loss of a grown run and a run from scratch, against FLOPs."""
    axes.plot(
        (speedup.flops_grown, speedup.flops_scratch),
        (speedup.loss,) * 2,
        color="black",
        lw=1.2,
        marker="|",
        ms=10,
        zorder=5,
        label=f"equal loss {speedup.loss:.3f}: sp = {speedup.speedup:+.1%}",
    )


def set_grid(axes: Axes) -> None:
    """Set grid and spines in the common style of the report's plots."""
    axes.grid(color=GRID_GREY, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def format_axes(axes: Axes, log_x: bool = False) -> None:
    """Set grid, spines and x axis in the common style of the report's plots."""
    set_grid(axes)
    if log_x:
        axes.set_xscale("log")
        axes.set_xlim(left=axes.dataLim.x1 / 100)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)


def format_costs(axes: Axes, x: str) -> None:
    """Set the ticks of an x axis of tokens, seconds or FLOPs."""
    if x == "tokens":
        axes.xaxis.set_major_formatter(token_format())
    elif x == "seconds":
        end = axes.get_xlim()[1]
        step = next((step for step in TIME_STEPS if end < MAX_TICKS * step), None)
        if step is not None and axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MultipleLocator(step))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: format_duration(at)))
    else:
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(MAX_TICKS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:.3g}".replace("+", "")))


def token_format() -> EngFormatter:
    """Return a tick formatter for token counts: 10k, 10M, 10B, 10T."""
    formatter = EngFormatter(sep="")
    formatter.ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "B", 12: "T"}
    return formatter


def _loss_range(runs: Sequence[RunCurves]) -> tuple[float, float]:
    """Return the limits of the loss axis, excluding the steep start of each run."""
    losses = [
        loss
        for run in runs
        for series in (run.train, run.validation)
        for tokens, loss in zip(series.tokens, series.loss, strict=True)
        if tokens >= STEEP_SHARE * run.tokens
    ]
    margin = 0.04 * (max(losses) - min(losses)) or 0.1
    return min(losses) - 2 * margin, max(losses) + margin


def _format_parameters(parameters: int) -> str:
    return f"{parameters / 1e6:.3g}M" if parameters < 1e9 else f"{parameters / 1e9:.3g}B"
