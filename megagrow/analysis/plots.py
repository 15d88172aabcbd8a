"""Loss against FLOPs and against tokens, for several runs, as a PNG.

Colours are Okabe and Ito's, which the colour-blind can tell apart; line styles and markers differ
as well, so that the plot reads in black and white.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from megagrow.analysis.curves import SMOOTHING, Growth, RunCurves, Series
from megagrow.analysis.speedup import Speedup


class Look(NamedTuple):
    """How one run is drawn."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str


LOOKS = (
    Look("#D55E00", "-", "o"),
    Look("#0072B2", (0, (5, 2)), "s"),
    Look("#009E73", (0, (6, 2, 1, 2)), "^"),
    Look("#CC79A7", (0, (1, 1)), "D"),
    Look("#E69F00", (0, (3, 1, 1, 1, 1, 1)), "v"),
    Look("#56B4E9", (0, (8, 3)), "P"),
    Look("#000000", (0, (2, 3)), "X"),
)
START = 0.06
"""The loss axis leaves out the steep fall in this first share of each run."""
MOST_MARKERS = 16
GREY = "#555555"


@dataclass(frozen=True, slots=True)
class Panel:
    """Axes, and what their x axis is: `tokens`, `seconds`, or FLOPs by an account (`accounts`)."""

    axes: Axes
    x: str

    def across(self, run: RunCurves, series: Series) -> Sequence[float]:
        """Where the points of one of the run's series stand. The account must be known of it."""
        if self.x == "flops_charged":
            return run.spent(series.tokens) or ()
        return getattr(series, self.x)

    def at(self, run: RunCurves, growth: Growth) -> float:
        """Where one of the run's growths stands."""
        if self.x == "flops_charged":
            return (run.spent((growth.tokens,)) or (0.0,))[0]
        return getattr(growth, self.x)


def plot_runs(
    runs: Sequence[RunCurves], path: Path, speedup: Speedup | None = None, log_x: bool = False
) -> None:
    """Writes the plot of `runs` to `path`.

    Growths are marked by a ring on the curve and a dotted line; `speedup`, where given, by the
    segment between the two points of equal loss. `log_x` makes the x axes logarithmic.
    """
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for panel in (Panel(left, "flops"), Panel(right, "tokens")):
        draw_panel(panel, runs, log_x)
    left.set(xlabel="training FLOPs (6 N per token, base included)", ylabel="loss (nats per token)")
    right.set_xlabel("tokens")
    if speedup is not None:
        _draw_speedup(left, speedup)
    left.legend(frameon=False, loc="upper right")
    trained = f"training loss, mean over the last {SMOOTHING:.0%} of the tokens"
    note = f"thick: validation loss; thin: {trained}" if any(map(_validated, runs)) else trained
    right.set_title(note, fontsize=8, color=GREY, loc="right")
    figure.savefig(path)


def _validated(run: RunCurves) -> bool:
    return len(run.validation.loss) > 1


def draw_panel(panel: Panel, runs: Sequence[RunCurves], log_x: bool = False) -> None:
    """Draws the losses of all runs and marks their growths."""
    for index, run in enumerate(runs):
        _draw_run(panel, run, look(index))
    dress(panel.axes, log_x)
    panel.axes.set_ylim(*_loss_range(runs))
    if panel.x == "tokens":
        panel.axes.xaxis.set_major_formatter(token_format())


def look(index: int) -> Look:
    """How the run at this place in the report is drawn; the looks repeat after the seventh."""
    return LOOKS[index % len(LOOKS)]


def shown(name: str) -> str:
    """A run's name as a label: no formula, and never one of those that legends leave out."""
    plain = name.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _draw_run(panel: Panel, run: RunCurves, look: Look) -> None:
    validated = _validated(run)
    thin = (
        {"linewidth": 0.9, "alpha": 0.55}
        if validated
        else {"linewidth": 1.8, "label": shown(run.name)}
    )
    draw = panel.axes.plot
    draw(panel.across(run, run.train), run.train.loss, color=look.colour, ls=look.line, **thin)
    if validated:
        draw(
            panel.across(run, run.validation),
            run.validation.loss,
            color=look.colour,
            ls=look.line,
            lw=1.9,
            marker=look.marker,
            ms=4.5,
            markevery=markers(len(run.validation.loss)),
            label=shown(run.name),
        )
    _draw_growths(panel, run, look)


def markers(points: int) -> slice:
    """Which of so many points get a marker: evenly, the last one always."""
    step = -(-points // MOST_MARKERS)
    return slice((points - 1) % step, None, step)


def _draw_growths(panel: Panel, run: RunCurves, look: Look) -> None:
    series = run.validation if _validated(run) else run.train
    for growth in run.growths:
        at = panel.at(run, growth)
        before = _loss_before(series, growth.tokens)
        panel.axes.axvline(at, color=look.colour, ls=":", lw=1.0)
        panel.axes.plot(at, before, "o", ms=9, mfc="none", mec=look.colour, mew=1.5)
        old, new = (_millions(run.parameters[growth.stage + shift]) for shift in (-1, 0))
        panel.axes.annotate(
            f"growth {old} \u2192 {new}",
            (at, 0.99),
            xycoords=("data", "axes fraction"),
            xytext=(2, 0),
            textcoords="offset points",
            rotation="vertical",
            va="top",
            fontsize=8,
            color=look.colour,
        )


def _loss_before(series: Series, tokens: int) -> float:
    """The last loss measured up to `tokens`, or the first one of all."""
    upto = [loss for at, loss in zip(series.tokens, series.loss, strict=True) if at <= tokens]
    return upto[-1] if upto else series.loss[0]


def _draw_speedup(axes: Axes, speedup: Speedup) -> None:
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


def dress(axes: Axes, log_x: bool = False) -> None:
    """Grid, spines and the x axis, as every plot of a report has them."""
    if log_x:
        axes.set_xscale("log")
        axes.set_xlim(left=axes.dataLim.x1 / 100)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.grid(color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def token_format() -> EngFormatter:
    """10k, 10M, 10B, 10T."""
    words = EngFormatter(sep="")
    words.ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "B", 12: "T"}
    return words


def _loss_range(runs: Sequence[RunCurves]) -> tuple[float, float]:
    """The y axis: everything but the steep fall at each run's start."""
    shown = [
        loss
        for run in runs
        for series in (run.train, run.validation)
        for tokens, loss in zip(series.tokens, series.loss, strict=True)
        if tokens >= START * run.tokens
    ]
    margin = 0.04 * (max(shown) - min(shown)) or 0.1
    return min(shown) - 2 * margin, max(shown) + margin


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g}M" if parameters < 1e9 else f"{parameters / 1e9:.3g}B"
