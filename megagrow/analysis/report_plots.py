"""Plots of a report in addition to the loss plot of `plots`.

Each run is drawn in the style `plots.PLOT_STYLES[index]` of its index in the report.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.plots import (
    Panel,
    draw_panel,
    label_text,
    marker_slice,
    plot_style,
    token_format,
)
from megagrow.analysis.run_metrics import MetricSeries
from megagrow.analysis.seeds import Matchup

WIDTH, HEIGHT, DPI = 11.0, 4.4, 150
GIB = 2.0**30


def plot_costs(runs: Sequence[RunCurves]) -> Figure:
    """Plot the loss against seconds, true FLOPs and FLOPs by the paper's charge.

    The paper's charge is omitted unless all runs have a config.yaml.
    """
    accounts = [account for account in ACCOUNTS if account != "flops"]
    if not all(run.setting for run in runs):
        accounts.remove("flops_charged")
    figure, panels = _figure(len(accounts) + 1, sharey=True)
    for axes, account in zip(panels, accounts, strict=False):
        draw_panel(Panel(axes, account), runs)
        axes.set_title(f"FLOPs: {ACCOUNTS[account]}", fontsize=8.5)
        axes.set_xlabel("FLOPs")
    draw_panel(Panel(panels[-1], "seconds"), runs)
    panels[-1].set_title("Time of steps, growths and checkpoints", fontsize=8.5)
    panels[-1].set_xlabel("seconds")
    panels[0].set_ylabel("loss (nats per token)")
    panels[-1].legend(frameon=False, loc="upper right")
    return figure


def plot_speedups(matchups: Sequence[Matchup], indices: Sequence[int]) -> Figure:
    """Plot sp and the fraction of FLOPs saved against the shared losses.

    `indices` are the indices of the grown groups' first runs in the report.
    """
    figure, (left, right) = _figure(2)
    for matchup, index in zip(matchups, indices, strict=True):
        levels = matchup.levels["flops"]
        if not levels:
            continue
        losses, name = [level.loss for level in levels], matchup.grown.name
        _line(left, losses, [level.mean for level in levels], index, name)
        _line(right, losses, [level.saved for level in levels], index, name)
        if not matchup.single:
            low, high = ([bound(level.speedups) for level in levels] for bound in (min, max))
            left.fill_between(losses, low, high, color=plot_style(index).color, alpha=0.2, lw=0)
    for axes, title in ((left, "Speedup sp at equal loss"), (right, "FLOPs saved at equal loss")):
        axes.axhline(0.0, color="black", lw=0.8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("loss (nats per token), decreasing")
        _finish(axes)
        axes.invert_xaxis()
    left.set_ylabel("sp = FLOPs scratch / FLOPs grown - 1")
    right.set_ylabel("1 - 1 / (1 + sp)")
    return figure


def plot_spikes(runs: Sequence[RunCurves]) -> Figure:
    """Plot the training loss around each growth against tokens since the growth."""
    figure, (axes,) = _figure(1)
    for index, run in enumerate(runs):
        for growth in run.growths:
            window = 0.25 * run.tokens
            points = [
                (tokens - growth.tokens, loss)
                for tokens, loss in zip(run.train.tokens, run.train.loss, strict=True)
                if -0.4 * window <= tokens - growth.tokens <= window
            ]
            label = f"{run.name}, growth into stage {growth.stage}"
            _line(axes, [at for at, _ in points], [loss for _, loss in points], index, label)
    axes.axvline(0.0, color="black", ls=":", lw=1.0)
    axes.xaxis.set_major_formatter(token_format())
    axes.set(xlabel="tokens since the growth", ylabel="training loss (nats per token)")
    axes.set_title("Training loss around each growth, smoothed within each stage", fontsize=10)
    _finish(axes)
    return figure


def plot_run_metrics(runs: Sequence[RunCurves]) -> Figure:
    """Plot gradient norm, throughput, memory and, if recorded, MFU against tokens."""
    kinds = [
        ("grad_norm", "Gradient norm, before clipping", "norm", 1.0),
        ("tokens_per_second", "Throughput, all ranks", "tokens per second", 1.0),
        ("memory_bytes", "Peak memory, rank 0", "GiB", GIB),
    ]
    if any(run.metrics.mfu.values for run in runs):
        kinds.append(("mfu", "Utilization (MFU)", "% of peak FLOP/s", 0.01))
    figure, panels = _figure(len(kinds))
    for axes, (name, title, unit, scale) in zip(panels, kinds, strict=True):
        for index, run in enumerate(runs):
            _draw_metric(axes, run, getattr(run.metrics, name), index, scale)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="tokens", ylabel=unit)
        axes.xaxis.set_major_formatter(token_format())
        _finish(axes)
    panels[0].set_yscale("log")
    panels[1].yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in panels[1:]:
        axes.set_ylim(bottom=0)
    return figure


def plot_scores(runs: Sequence[RunCurves]) -> Figure:
    """Plot the average accuracy of evaluations against tokens, FLOPs and seconds."""
    units = {"tokens": "tokens", "flops": f"FLOPs, {ACCOUNTS['flops']}", "seconds": "seconds"}
    figure, panels = _figure(len(units), sharey=True)
    for axes, (x, unit) in zip(panels, units.items(), strict=True):
        for index, run in enumerate(runs):
            scores = [(getattr(score, x), score.average) for score in run.scores]
            points = [(at, average) for at, average in scores if average is not None]
            _line(axes, [at for at, _ in points], [y for _, y in points], index, run.name)
            for growth in run.growths:
                axes.axvline(getattr(growth, x), color=plot_style(index).color, ls=":", lw=1.0)
        axes.set_title(f"Average accuracy against {x.replace('flops', 'FLOPs')}", fontsize=10)
        axes.set_xlabel(unit)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _finish(axes)
    panels[0].xaxis.set_major_formatter(token_format())
    panels[0].set_ylabel("average accuracy of the tasks")
    return figure


def _draw_metric(
    axes: Axes, run: RunCurves, metric: MetricSeries, index: int, scale: float
) -> None:
    _line(axes, metric.tokens, [value / scale for value in metric.values], index, run.name)
    for growth in run.growths:
        axes.axvline(growth.tokens, color=plot_style(index).color, ls=":", lw=1.0)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], index: int, label: str) -> None:
    style = plot_style(index)
    axes.plot(
        x,
        y,
        color=style.color,
        ls=style.line,
        lw=1.4,
        marker=style.marker,
        ms=4.5,
        markevery=marker_slice(len(x)) if x else None,
        label=label_text(label),
    )


def _figure(panels: int, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=sharey, squeeze=False)[0])


def _finish(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
