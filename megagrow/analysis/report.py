"""A report on runs: what is compared, plotted and written, in order."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from megagrow.analysis.compare import PLOT, closing_lines, compare_runs, load_runs
from megagrow.analysis.curves import RunCurves
from megagrow.analysis.paper import beside_paper, read_paper
from megagrow.analysis.report_page import Plot, render_page
from megagrow.analysis.report_plots import (
    plot_costs,
    plot_gauges,
    plot_scores,
    plot_speedups,
    plot_spikes,
)
from megagrow.analysis.report_tables import as_markdown, growths, scores, speedups, summary
from megagrow.analysis.seeds import Matchup, group_runs, match_groups
from megagrow.common.tables import print_lines

PAGE, MARKDOWN = "report.html", "report.md"
TITLE = "Grown against from scratch"


def write_report(
    directories: Sequence[Path], output: Path, console: Console, against_paper: bool = False
) -> None:
    """Reports on finished runs into `output`: report.html with everything, the same tables as
    report.md, the plots as PNGs, and what `compare_runs` writes; the table is printed, too. With
    `against_paper` a table puts the runs beside the paper's results.

    Raises InputError where a run is missing or unfinished, none grew, or one has no counterpart.
    """
    curves = load_runs(directories)
    matchups = match_groups(group_runs(curves))
    comparisons = compare_runs(curves, output, console)
    tables = [summary(curves), speedups(matchups), growths(curves)]
    if any(run.scores for run in curves):
        tables.append(scores(curves))
    if against_paper:
        tables.insert(2, beside_paper(matchups, read_paper()))
    plots = _plots(curves, matchups, output)
    page = render_page(TITLE, tables, closing_lines(curves, comparisons), plots)
    (output / PAGE).write_text(page, encoding="utf-8")
    text = "\n".join([f"# {TITLE}", "", *map(as_markdown, tables)])
    (output / MARKDOWN).write_text(text, encoding="utf-8")
    print_lines(console, [f"Page: {output / PAGE}"])


def _plots(curves: Sequence[RunCurves], matchups: Sequence[Matchup], output: Path) -> list[Plot]:
    places = [curves.index(matchup.grown.runs[0]) for matchup in matchups]
    plots = [
        Plot(
            output / PLOT,
            "Loss against FLOPs and tokens",
            "Loss against FLOPs and against tokens. Growths: a dotted line and a ring. The black "
            "segment joins the points of equal loss of the first comparison.",
        )
    ]
    if any(matchup.levels["flops"] for matchup in matchups):
        plots.append(
            _saved(
                plot_speedups(matchups, places),
                output / "speedup.png",
                "Speedup along the curve",
                "Speedup sp and the share of FLOPs saved, at every loss that both sides share. "
                "Above zero growth was the faster way; a band is the range over seeds.",
            )
        )
    plots += [
        _saved(
            plot_costs(curves),
            output / "loss_by_cost.png",
            "Loss against other costs",
            "The same losses against FLOPs by other accounts, and against training seconds.",
        ),
        _saved(
            plot_spikes(curves),
            output / "spikes.png",
            "Around the growths",
            "The smoothed training loss before and after each growth, by tokens since.",
        ),
        _saved(
            plot_gauges(curves),
            output / "gauges.png",
            "Gradients, throughput, memory",
            "Gradient norm before clipping, tokens per second of all ranks together, and peak "
            "memory of the first rank, against tokens. Dotted lines: growths.",
        ),
    ]
    if any(score.average is not None for run in curves for score in run.scores):
        plots.append(
            _saved(
                plot_scores(curves),
                output / "accuracy.png",
                "Accuracy",
                "Average accuracy of evaluations, during the runs or of their checkpoints, against "
                "tokens, FLOPs and seconds. Dotted lines: growths.",
            )
        )
    return plots


def _saved(figure: Figure, path: Path, title: str, caption: str) -> Plot:
    figure.savefig(path)
    return Plot(path, title, caption)
