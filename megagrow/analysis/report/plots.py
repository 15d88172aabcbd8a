"""Plots of a report: sections of panels that a page arranges by its width.

Each run is drawn in the style `plots.PLOT_STYLES[index]` of its index in the report; the page has
the legend.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    PercentFormatter,
)

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.mixing import MixingTimes
from megagrow.analysis.plots import (
    COST_LABELS,
    GREY,
    Panel,
    draw_panel,
    draw_speedup,
    format_costs,
    line_note,
    marker_slice,
    plot_style,
    set_grid,
    thinned,
    token_format,
)
from megagrow.analysis.report.content import Report
from megagrow.analysis.report.svg import svg_text
from megagrow.analysis.run_metrics import MetricSeries
from megagrow.analysis.seeds import Matchup

WIDTH, HEIGHT = 4.3, 3.1
"""Inches of a panel, which is shown 350 to 400 pixels wide."""
GIB = 2.0**30


@dataclass(frozen=True)
class PlotSection:
    """Panels under one title: file name -> figure."""

    title: str
    caption: str
    panels: dict[str, Figure]

    @cached_property
    def svgs(self) -> dict[str, str]:
        """Panels as SVG documents: file name -> text."""
        return {name: svg_text(figure, name) for name, figure in self.panels.items()}


def plot_sections(report: Report) -> Iterator[PlotSection]:
    """Yield the sections of a report's plots that have data."""
    runs = report.runs
    yield PlotSection(
        "Loss against FLOPs, tokens and training time",
        "Training time is the time of steps, growths and checkpoints. A dotted line and a ring "
        "mark a growth, with its new size. The horizontal segment connects the points of equal "
        "loss of the first pair. Against tokens, a star marks the end of the mixing time.",
        _loss_panels(report),
    )
    if any(matchup.levels["flops"] for matchup in report.matchups):
        indices = [runs.index(matchup.grown.runs[0]) for matchup in report.matchups]
        yield PlotSection(
            "Speedup against loss",
            "Speedup sp and fraction of FLOPs saved at every loss that both sides reach. "
            "Positive values mean that growth is faster; bands are the range over seeds.",
            _speedup_panels(report.matchups, indices),
        )
    if any(run.growths for run in runs):
        yield PlotSection(
            "Loss around growths, and other accounts of FLOPs",
            "Smoothed training loss before and after each growth, and the same losses against "
            "FLOPs by the other accounts.",
            {"spikes": plot_spikes(runs), **_account_panels(runs)},
        )
    yield PlotSection(
        "Gradient norm, throughput, memory",
        "Gradient norm before clipping, tokens per second over all ranks, and peak memory of rank "
        "0, against tokens. Dotted lines mark growths.",
        plot_run_metrics(runs),
    )
    if any(score.average is not None for run in runs for score in run.scores):
        yield PlotSection(
            "Accuracy",
            "Average accuracy of evaluations, during the runs or of their checkpoints. Dotted "
            "lines mark growths.",
            plot_scores(runs),
        )


def _loss_panels(report: Report) -> dict[str, Figure]:
    panels, speedup = {}, report.speedup
    for x, label in COST_LABELS.items():
        figure, axes = _panel(label, "loss (nats per token)")
        draw_panel(Panel(axes, x), report.runs)
        if x == "flops" and speedup is not None:
            draw_speedup(axes, speedup)
        if x == "tokens":
            for mixing in report.mixing_times:
                _draw_mixing(axes, mixing)
        _finish(axes, line_note(report.runs))
        panels[f"loss-{x}"] = figure
    return panels


def _draw_mixing(axes: Axes, mixing: MixingTimes) -> None:
    """Mark the point at which the first pair of a matchup meets, if it does."""
    pair, growth = mixing.pairs[0], mixing.matchup.grown.runs[0].growths[-1]
    if pair.tokens is not None and pair.loss is not None:
        axes.plot(growth.tokens + pair.tokens, pair.loss, "*", color="black", ms=10, zorder=5)


def _account_panels(runs: Sequence[RunCurves]) -> dict[str, Figure]:
    """Plot the loss against the other accounts of FLOPs, if they are known for all runs."""
    panels = {}
    for account, name in ACCOUNTS.items():
        if account == "flops" or (account == "flops_charged" and not all(r.setting for r in runs)):
            continue
        figure, axes = _panel(f"FLOPs: {name}", "loss (nats per token)")
        draw_panel(Panel(axes, account), runs)
        _finish(axes, line_note(runs))
        panels[f"loss-{account.replace('_', '-')}"] = figure
    return panels


def _speedup_panels(matchups: Sequence[Matchup], indices: Sequence[int]) -> dict[str, Figure]:
    """Plot sp and the fraction of FLOPs saved; `indices` are those of the grown groups' runs."""
    label = "loss (nats per token), decreasing"
    speedups, left = _panel(label, "sp = FLOPs scratch / FLOPs grown - 1")
    saved, right = _panel(label, "FLOPs saved, 1 - 1 / (1 + sp)")
    for matchup, index in zip(matchups, indices, strict=True):
        levels = matchup.levels["flops"]
        losses = [level.loss for level in levels]
        _line(left, losses, [level.mean for level in levels], index)
        _line(right, losses, [level.saved for level in levels], index)
        if not matchup.single:
            low, high = ([bound(level.speedups) for level in levels] for bound in (min, max))
            left.fill_between(losses, low, high, color=plot_style(index).color, alpha=0.2, lw=0)
    for axes in (left, right):
        axes.axhline(0.0, color="black", lw=0.8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _finish(axes, "at equal loss")
        axes.invert_xaxis()
    return {"speedup": speedups, "flops-saved": saved}


def plot_spikes(runs: Sequence[RunCurves]) -> Figure:
    """Plot the training loss around each growth against tokens since the growth."""
    figure, axes = _panel("tokens since the growth", "training loss (nats per token)")
    for index, run in enumerate(runs):
        for growth in run.growths:
            window = 0.25 * run.tokens
            points = [
                (tokens - growth.tokens, loss)
                for tokens, loss in zip(run.train.tokens, run.train.loss, strict=True)
                if -0.4 * window <= tokens - growth.tokens <= window
            ]
            _line(axes, [at for at, _ in points], [loss for _, loss in points], index)
    axes.axvline(0.0, color="black", ls=":", lw=1.0)
    axes.xaxis.set_major_formatter(token_format())
    _finish(axes, "smoothed within each stage")
    return figure


def plot_run_metrics(runs: Sequence[RunCurves]) -> dict[str, Figure]:
    """Plot gradient norm, throughput, memory and, if recorded, MFU against tokens."""
    kinds = [
        ("grad_norm", "gradient norm, before clipping", 1.0),
        ("tokens_per_second", "tokens per second, all ranks", 1.0),
        ("memory_bytes", "peak memory of rank 0 (GiB)", GIB),
        ("mfu", "utilization (MFU, % of peak FLOP/s)", 0.01),
    ]
    panels = {}
    for name, label, scale in kinds:
        if any(getattr(run.metrics, name).values for run in runs):
            figure, axes = _panel("tokens", label)
            for index, run in enumerate(runs):
                _draw_metric(axes, run, getattr(run.metrics, name), index, scale)
            axes.xaxis.set_major_formatter(token_format())
            if name == "grad_norm":
                _set_log_scale(axes)
            else:
                axes.set_ylim(bottom=0)
            if name == "tokens_per_second":
                axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            _finish(axes)
            panels[name.replace("_", "-")] = figure
    return panels


def plot_scores(runs: Sequence[RunCurves]) -> dict[str, Figure]:
    """Plot the average accuracy of evaluations against FLOPs, tokens and training time."""
    panels = {}
    for x, label in COST_LABELS.items():
        figure, axes = _panel(label, "average accuracy of the tasks")
        for index, run in enumerate(runs):
            scores = [(getattr(score, x), score.average) for score in run.scores]
            points = [(at, average) for at, average in scores if average is not None]
            _line(axes, [at for at, _ in points], [y for _, y in points], index)
            _draw_growths(axes, [getattr(growth, x) for growth in run.growths], index)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        format_costs(axes, x)
        _finish(axes)
        panels[f"accuracy-{x}"] = figure
    return panels


def _draw_metric(
    axes: Axes, run: RunCurves, metric: MetricSeries, index: int, scale: float
) -> None:
    _line(axes, metric.tokens, [value / scale for value in metric.values], index)
    _draw_growths(axes, [growth.tokens for growth in run.growths], index)


def _set_log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_growths(axes: Axes, positions: Sequence[float], index: int) -> None:
    for at in positions:
        axes.axvline(at, color=plot_style(index).color, ls=":", lw=1.0)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], index: int) -> None:
    style = plot_style(index)
    x, y = thinned(x, y)
    (line,) = axes.plot(x, y, color=style.color, ls=style.line, lw=1.3, marker=style.marker, ms=4.0)
    if x:
        line.set_markevery(marker_slice(len(x)))


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)
    axes.tick_params(labelsize=8)
    return figure, axes


def _finish(axes: Axes, note: str = "") -> None:
    """Set the common style of panels; `note` in small print describes the lines."""
    set_grid(axes)
    axes.set_title(note, fontsize=7, color=GREY, loc="right")
