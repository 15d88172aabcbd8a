"""Plots of `megagrow fit` as PNGs, in the styles of `analysis.plots`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter

from megagrow.analysis.plots import GREY, PLOT_STYLES, PlotStyle, set_grid
from megagrow.fits.data import IsoPoint, ScalingPoint
from megagrow.fits.least_squares import Numbers
from megagrow.fits.parabola import PAPER_BEST, FactorFit, Parabola
from megagrow.fits.scaling import FlopSaving, PowerLaw, saving_at
from megagrow.fits.timing import TimingFit

LOSS = "loss (nats per token)"
COLUMNS = 3
LEGEND_COLUMNS = 4


def plot_timing(
    points: Sequence[IsoPoint], parabolas: Sequence[Parabola], fit: TimingFit, path: Path
) -> None:
    """Write a panel of parabolas for each N, and one of the best d against C with the fit."""
    figure, last = _parabola_panels(points, parabolas, "d, tokens of the base before the growth")
    for style, size in zip(_styles(), _sizes(parabolas), strict=False):
        flops = _log_grid([one.flops for one in parabolas])
        fitted = np.array([fit.growth_tokens(size, at) for at in flops])
        last.plot(flops, fitted, color=style.color, ls=style.line, lw=1.5)
    last.set(ylabel="best d (tokens)", yscale="log")
    last.set_title("lines: log10 d = a log10 N + b / log10 C + c", fontsize=8, color=GREY)
    figure.savefig(path)


def plot_factor(
    points: Sequence[IsoPoint], parabolas: Sequence[Parabola], fit: FactorFit, path: Path
) -> None:
    """Write a panel of parabolas for each N, and one of the best g against C with the mean."""
    figure, last = _parabola_panels(points, parabolas, "g, growth factor")
    last.set(ylabel="best g", yscale="log")
    tried = sorted({point.choice for point in points})
    for panel in figure.axes:
        axis = panel.yaxis if panel is last else panel.xaxis
        axis.set_major_locator(FixedLocator(tried))
        axis.set_major_formatter(FuncFormatter(lambda g, _: f"{g:g}"))
        axis.set_minor_formatter(NullFormatter())
    last.axhline(fit.factor, color="black", lw=1.5, label=f"recommended g = {fit.factor:.3g}")
    if fit.low is not None and fit.high is not None:
        last.axhspan(fit.low, fit.high, color="black", alpha=0.15, lw=0, label="95% interval")
    for end, name in zip(PAPER_BEST, ("paper: 2 to 4", None), strict=True):
        last.axhline(end, color=GREY, lw=1.0, ls=":", label=name)
    last.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def plot_scaling(
    points: Sequence[ScalingPoint],
    laws: tuple[PowerLaw, PowerLaw],
    savings: Sequence[FlopSaving],
    path: Path,
) -> None:
    """Write a plot of the losses with both fitted laws, and one of the saving against C."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    farthest = max([saving.flops for saving in savings] + [law.flops[1] for law in laws])
    for law, style in zip(laws, PLOT_STYLES, strict=False):
        _draw_law(left, law, style, farthest)
        selected = [point for point in points if point.kind == law.kind]
        flops, losses = [point.flops for point in selected], [point.loss for point in selected]
        label = f"{law.kind}: runs"
        left.plot(flops, losses, style.marker, color=style.color, ms=5, mfc="none", label=label)
    left.set(xscale="log", xlabel="C, training FLOPs (base included)", ylabel=LOSS)
    left.set_title("thick: within the data; thin: extrapolated", fontsize=8, color=GREY)
    _draw_saving(right, laws, savings, farthest)
    right.set(xscale="log", xlabel="C, training FLOPs of the grown run (base included)")
    right.set_ylabel("saving: scratch FLOPs for the same loss / C - 1")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        set_grid(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _parabola_panels(
    points: Sequence[IsoPoint], parabolas: Sequence[Parabola], choice: str
) -> tuple[Figure, Axes]:
    """Return a figure with one panel of parabolas per size, and the axes of its last panel.

    The last panel shows the best choices against the budget.
    """
    sizes = _sizes(parabolas)
    columns = 2 if len(sizes) == 3 else min(COLUMNS, len(sizes) + 1)
    rows = -(-(len(sizes) + 1) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.0 * rows), dpi=150, layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for panel in panels[len(sizes) + 1 :]:
        panel.remove()
    last: Axes = panels[len(sizes)]
    for panel, size, style in zip(panels, sizes, _styles(), strict=False):
        of_size = [parabola for parabola in parabolas if parabola.parameters == size]
        for parabola, own_style in zip(of_size, _styles(), strict=False):
            _draw_parabola(panel, points, parabola, own_style)
        panel.set(xscale="log", xlabel=choice, ylabel=LOSS)
        panel.set_title(f"N = {size:.3g}; filled: runs, ring: best", fontsize=8, color=GREY)
        bottom, top = panel.get_ylim()
        panel.set_ylim(top=top + 0.2 * (top - bottom))  # space for the legend
        panel.legend(
            frameon=False, fontsize=7, title="C (FLOPs)", title_fontsize=7, loc="upper center",
            ncols=LEGEND_COLUMNS,
        )  # fmt: skip
        set_grid(panel)
        _draw_best(last, of_size, style)
    last.set(xscale="log", xlabel="C, budget (FLOPs)")
    last.legend(frameon=False, fontsize=8)
    set_grid(last)
    return figure, last


def _draw_parabola(
    axes: Axes, points: Sequence[IsoPoint], parabola: Parabola, style: PlotStyle
) -> None:
    key = parabola.parameters, parabola.flops
    selected = [point for point in points if (point.parameters, point.flops) == key]
    choices, losses = [point.choice for point in selected], [point.loss for point in selected]
    refused = "" if parabola.refused is None else ", refused"
    label = f"{parabola.flops:.3g}{refused}"
    axes.plot(choices, losses, style.marker, color=style.color, ms=4, label=label)
    if parabola.coefficients is None:
        return
    x = np.geomspace(*parabola.tried, 100)
    axes.plot(x, parabola.loss_at(x), color=style.color, ls=style.line, lw=1.3)
    if parabola.best is not None:
        lowest = parabola.loss_at(np.array([parabola.best]))
        axes.plot(parabola.best, lowest, "o", ms=9, mfc="none", mec=style.color, mew=1.5)


def _draw_best(axes: Axes, parabolas: Sequence[Parabola], style: PlotStyle) -> None:
    """Draw the best choices of one size with error bars of one standard error."""
    label = f"N = {parabolas[0].parameters:.3g}"
    for one in parabolas:
        if one.best is None:
            continue
        error = one.standard_error or 0.0
        bars = [[one.best - one.best / 10**error], [one.best * 10**error - one.best]]
        axes.errorbar(
            one.flops, one.best, bars, fmt=style.marker, color=style.color, ms=5, label=label
        )
        label = ""


def _draw_law(axes: Axes, law: PowerLaw, style: PlotStyle, farthest: float) -> None:
    inside, beyond = np.geomspace(*law.flops, 100), np.geomspace(law.flops[1], farthest, 100)
    floor = f" + {law.e.value:.3g}" if len(law.theta) > 2 else ""
    label = f"{law.kind}: {law.a.value:.3g} C^{law.b.value:.3g}{floor}"
    axes.plot(inside, law.loss(inside), color=style.color, ls=style.line, lw=2.0, label=label)
    axes.plot(beyond, law.loss(beyond), color=style.color, ls=style.line, lw=0.9)
    for flops in (inside, beyond):
        if band := law.band(flops):
            axes.fill_between(flops, *band, color=style.color, alpha=0.15, lw=0)


def _draw_saving(
    axes: Axes, laws: tuple[PowerLaw, PowerLaw], savings: Sequence[FlopSaving], farthest: float
) -> None:
    scratch, grown = laws
    low = min([grown.flops[0], *(saving.flops for saving in savings)])
    curve = _drawable([saving_at(scratch, grown, at) for at in np.geomspace(low, farthest, 200)])
    flops = [one.flops for one in curve]
    axes.plot(flops, _column(curve, lambda one: one.saving), color="black", lw=1.5)
    if all(one.low is not None for one in curve):
        lower, upper = (_column(curve, get) for get in (lambda o: o.low, lambda o: o.high))
        axes.fill_between(flops, lower, upper, color="black", alpha=0.15, lw=0, label="95% band")
    requested = _drawable(savings)
    budgets = [one.flops for one in requested]
    axes.plot(budgets, _column(requested, lambda one: one.saving), "ko", ms=5, label="requested")
    axes.axvline(grown.flops[1], color=GREY, ls=":", lw=1.2, label="end of the grown data")
    axes.axhline(0.0, color=GREY, lw=0.8)


def _drawable(savings: Sequence[FlopSaving]) -> list[FlopSaving]:
    """Return the savings that are defined and have a finite band."""
    return [one for one in savings if one.saving is not None and one.high != np.inf]


def _column(savings: Sequence[FlopSaving], get: Callable[[FlopSaving], float | None]) -> Numbers:
    return np.array([get(one) for one in savings], dtype=np.float64)


def _sizes(parabolas: Sequence[Parabola]) -> list[float]:
    return sorted({one.parameters for one in parabolas})


def _styles() -> list[PlotStyle]:
    """Return the plot styles, repeated."""
    return list(PLOT_STYLES) * 10


def _log_grid(values: Sequence[float]) -> Numbers:
    """Return a log-spaced grid over the range of the values, extended by 10% on each side."""
    return np.geomspace(min(values) / 1.1, max(values) * 1.1, 50)
