"""The plots of `megagrow fit`, as PNGs, in the colours, lines and markers of `plots`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter

from megagrow.analysis.plots import GREY, LOOKS, Look
from megagrow.fits.data import IsoPoint, ScalingPoint
from megagrow.fits.factor import PAPER_BEST, FactorFit
from megagrow.fits.least_squares import Numbers
from megagrow.fits.parabola import Parabola
from megagrow.fits.scaling import FlopSaving, PowerLaw, saving_at
from megagrow.fits.timing import TimingFit

LOSS = "loss (nats per token)"
COLUMNS = 3
LEGEND_COLUMNS = 4


def plot_timing(
    points: Sequence[IsoPoint], parabolas: Sequence[Parabola], fit: TimingFit, path: Path
) -> None:
    """Writes a panel of parabolas for each N, and one of the best d against C with the fit."""
    figure, last = _parabola_panels(points, parabolas, "d, tokens of the base before the growth")
    for look, size in zip(_looks(), _sizes(parabolas), strict=False):
        flops = _around([one.flops for one in parabolas])
        fitted = np.array([fit.growth_tokens(size, at) for at in flops])
        last.plot(flops, fitted, color=look.colour, ls=look.line, lw=1.5)
    last.set(ylabel="best d (tokens)", yscale="log")
    last.set_title("lines: log10 d = a log10 N + b / log10 C + c", fontsize=8, color=GREY)
    figure.savefig(path)


def plot_factor(
    points: Sequence[IsoPoint], parabolas: Sequence[Parabola], fit: FactorFit, path: Path
) -> None:
    """Writes a panel of parabolas for each N, and one of the best g against C with the mean."""
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
        last.axhspan(fit.low, fit.high, color="black", alpha=0.15, lw=0, label="its 95% interval")
    for end, name in zip(PAPER_BEST, ("the paper's 2 to 4", None), strict=True):
        last.axhline(end, color=GREY, lw=1.0, ls=":", label=name)
    last.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def plot_scaling(
    points: Sequence[ScalingPoint],
    laws: tuple[PowerLaw, PowerLaw],
    savings: Sequence[FlopSaving],
    path: Path,
) -> None:
    """Writes the losses with both laws, scratch and grown, and the saving against C, with bands."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    farthest = max([saving.flops for saving in savings] + [law.flops[1] for law in laws])
    for law, look in zip(laws, LOOKS, strict=False):
        _draw_law(left, law, look, farthest)
        mine = [point for point in points if point.kind == law.kind]
        at, losses = [point.flops for point in mine], [point.loss for point in mine]
        left.plot(
            at, losses, look.marker, color=look.colour, ms=5, mfc="none", label=f"{law.kind}: runs"
        )
    left.set(xscale="log", xlabel="C, training FLOPs (base included)", ylabel=LOSS)
    left.set_title("thick: fitted to points; thin: extrapolated", fontsize=8, color=GREY)
    _draw_saving(right, laws, savings, farthest)
    right.set(xscale="log", xlabel="C, training FLOPs of the grown run (base included)")
    right.set_ylabel("saving: scratch FLOPs for the same loss / C - 1")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        _dress(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _parabola_panels(
    points: Sequence[IsoPoint], parabolas: Sequence[Parabola], choice: str
) -> tuple[Figure, Axes]:
    """A panel for each size, and the axes of the best choices against the budget, points drawn."""
    sizes = _sizes(parabolas)
    columns = 2 if len(sizes) == 3 else min(COLUMNS, len(sizes) + 1)
    rows = -(-(len(sizes) + 1) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.0 * rows), dpi=150, layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for panel in panels[len(sizes) + 1 :]:
        panel.remove()
    last: Axes = panels[len(sizes)]
    for panel, size, look in zip(panels, sizes, _looks(), strict=False):
        mine = [one for one in parabolas if one.parameters == size]
        for parabola, own in zip(mine, _looks(), strict=False):
            _draw_parabola(panel, points, parabola, own)
        panel.set(xscale="log", xlabel=choice, ylabel=LOSS)
        panel.set_title(f"N = {size:.3g}; rings: best, filled: tried", fontsize=8, color=GREY)
        bottom, top = panel.get_ylim()
        panel.set_ylim(top=top + 0.2 * (top - bottom))  # room for the legend
        panel.legend(
            frameon=False, fontsize=7, title="C (FLOPs)", title_fontsize=7, loc="upper center",
            ncols=LEGEND_COLUMNS,
        )  # fmt: skip
        _dress(panel)
        _draw_best(last, mine, look)
    last.set(xscale="log", xlabel="C, budget (FLOPs)")
    last.legend(frameon=False, fontsize=8)
    _dress(last)
    return figure, last


def _draw_parabola(axes: Axes, points: Sequence[IsoPoint], parabola: Parabola, look: Look) -> None:
    place = parabola.parameters, parabola.flops
    mine = [point for point in points if (point.parameters, point.flops) == place]
    at, losses = [point.choice for point in mine], [point.loss for point in mine]
    refused = "" if parabola.refused is None else ", refused"
    label = f"{parabola.flops:.3g}{refused}"
    axes.plot(at, losses, look.marker, color=look.colour, ms=4, label=label)
    if parabola.coefficients is None:
        return
    x = np.geomspace(*parabola.tried, 100)
    axes.plot(x, parabola.loss_at(x), color=look.colour, ls=look.line, lw=1.3)
    if parabola.best is not None:
        lowest = parabola.loss_at(np.array([parabola.best]))
        axes.plot(parabola.best, lowest, "o", ms=9, mfc="none", mec=look.colour, mew=1.5)


def _draw_best(axes: Axes, parabolas: Sequence[Parabola], look: Look) -> None:
    """The best choices of one size, with one standard error to each side."""
    label = f"N = {parabolas[0].parameters:.3g}"
    for one in parabolas:
        if one.best is None:
            continue
        error = one.standard_error or 0.0
        reach = [[one.best - one.best / 10**error], [one.best * 10**error - one.best]]
        axes.errorbar(
            one.flops, one.best, reach, fmt=look.marker, color=look.colour, ms=5, label=label
        )
        label = ""


def _draw_law(axes: Axes, law: PowerLaw, look: Look, farthest: float) -> None:
    inside, beyond = np.geomspace(*law.flops, 100), np.geomspace(law.flops[1], farthest, 100)
    floor = f" + {law.e.value:.3g}" if len(law.theta) > 2 else ""
    label = f"{law.kind}: {law.a.value:.3g} C^{law.b.value:.3g}{floor}"
    axes.plot(inside, law.loss(inside), color=look.colour, ls=look.line, lw=2.0, label=label)
    axes.plot(beyond, law.loss(beyond), color=look.colour, ls=look.line, lw=0.9)
    for flops in (inside, beyond):
        if band := law.band(flops):
            axes.fill_between(flops, *band, color=look.colour, alpha=0.15, lw=0)


def _draw_saving(
    axes: Axes, laws: tuple[PowerLaw, PowerLaw], savings: Sequence[FlopSaving], farthest: float
) -> None:
    scratch, grown = laws
    low = min([grown.flops[0], *(saving.flops for saving in savings)])
    curve = _told([saving_at(scratch, grown, at) for at in np.geomspace(low, farthest, 200)])
    flops = [one.flops for one in curve]
    axes.plot(flops, _column(curve, lambda one: one.saving), color="black", lw=1.5)
    if all(one.low is not None for one in curve):
        low_end, high_end = (_column(curve, of) for of in (lambda o: o.low, lambda o: o.high))
        axes.fill_between(
            flops, low_end, high_end, color="black", alpha=0.15, lw=0, label="95% band"
        )
    asked = _told(savings)
    at = [one.flops for one in asked]
    axes.plot(at, _column(asked, lambda one: one.saving), "ko", ms=5, label="asked for")
    axes.axvline(grown.flops[1], color=GREY, ls=":", lw=1.2, label="end of the grown data")
    axes.axhline(0.0, color=GREY, lw=0.8)


def _told(savings: Sequence[FlopSaving]) -> list[FlopSaving]:
    """Those that are defined, with a band that can be drawn."""
    return [one for one in savings if one.saving is not None and one.high != np.inf]


def _column(savings: Sequence[FlopSaving], of: Callable[[FlopSaving], float | None]) -> Numbers:
    return np.array([of(one) for one in savings], dtype=np.float64)


def _sizes(parabolas: Sequence[Parabola]) -> list[float]:
    return sorted({one.parameters for one in parabolas})


def _looks() -> list[Look]:
    """Looks for more things than there are: they repeat."""
    return list(LOOKS) * 10


def _around(values: Sequence[float]) -> Numbers:
    """A log-spaced grid over the values and a little beyond."""
    return np.geomspace(min(values) / 1.1, max(values) * 1.1, 50)


def _dress(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
