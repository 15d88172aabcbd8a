"""Report on finished runs: comparison, tables, plots and the HTML page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.console import Console

from megagrow.analysis.compare import PLOT, closing_lines, compare_runs, load_runs
from megagrow.analysis.curves import SMOOTHING, RunCurves
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.paper import compare_with_paper, read_paper
from megagrow.analysis.report_plots import (
    plot_costs,
    plot_run_metrics,
    plot_scores,
    plot_speedups,
    plot_spikes,
)
from megagrow.analysis.report_tables import (
    Table,
    as_markdown,
    growth_table,
    run_table,
    score_table,
    speedup_table,
)
from megagrow.analysis.seeds import Matchup, group_runs, match_groups
from megagrow.analysis.speedup_curve import LEVELS, START_SHARE
from megagrow.common.tables import print_lines
from megagrow.errors import printable

PAGE, MARKDOWN = "report.html", "report.md"
TITLE = "Growth compared with training from scratch"


@dataclass(frozen=True, slots=True)
class Plot:
    """PNG of the report with title and caption."""

    path: Path
    title: str
    caption: str

    @property
    def base64(self) -> str:
        """File contents in base64, for a data URI."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


def write_report(
    directories: Sequence[Path], output: Path, console: Console, against_paper: bool = False
) -> None:
    """Write a report on finished runs into `output`.

    The files are report.html (self-contained), report.md with the same tables, the plots as PNGs,
    and those of `compare_runs`, which also prints its table. `against_paper` adds a table that
    compares the runs with the paper's results.

    Raises InputError if a run is missing or unfinished, no run grew, or a grown run has no
    counterpart.
    """
    curves = load_runs(directories)
    matchups = match_groups(group_runs(curves))
    comparisons = compare_runs(curves, output, console)
    tables = [run_table(curves), speedup_table(matchups), growth_table(curves)]
    if any(run.scores for run in curves):
        tables.append(score_table(curves))
    if against_paper:
        tables.insert(2, compare_with_paper(matchups, read_paper()))
    plots = _plots(curves, matchups, output)
    page = render_page(TITLE, tables, closing_lines(curves, comparisons), plots)
    (output / PAGE).write_text(page, encoding="utf-8")
    text = "\n".join([f"# {TITLE}", "", *map(as_markdown, tables)])
    (output / MARKDOWN).write_text(text, encoding="utf-8")
    print_lines(console, [f"Page: {output / PAGE}"])


def _plots(curves: Sequence[RunCurves], matchups: Sequence[Matchup], output: Path) -> list[Plot]:
    indices = [curves.index(matchup.grown.runs[0]) for matchup in matchups]
    plots = [
        Plot(
            output / PLOT,
            "Loss against FLOPs and tokens",
            "Loss against FLOPs and tokens. Growths are marked by a dotted line and a ring. The "
            "black segment connects the points of equal loss of the first comparison.",
        )
    ]
    if any(matchup.levels["flops"] for matchup in matchups):
        plots.append(
            _save_plot(
                plot_speedups(matchups, indices),
                output / "speedup.png",
                "Speedup against loss",
                "Speedup sp and fraction of FLOPs saved at every loss that both sides reach. "
                "Positive values mean that growth is faster; bands are the range over seeds.",
            )
        )
    plots += [
        _save_plot(
            plot_costs(curves),
            output / "loss_by_cost.png",
            "Loss against other costs",
            "The same losses against FLOPs by the other accounts and against training time.",
        ),
        _save_plot(
            plot_spikes(curves),
            output / "spikes.png",
            "Loss spikes at growths",
            "Smoothed training loss before and after each growth, against tokens since the growth.",
        ),
        _save_plot(
            plot_run_metrics(curves),
            output / "gauges.png",
            "Gradient norm, throughput, memory",
            "Gradient norm before clipping, tokens per second over all ranks, and peak memory of "
            "rank 0, against tokens. Dotted lines mark growths.",
        ),
    ]
    if any(score.average is not None for run in curves for score in run.scores):
        plots.append(
            _save_plot(
                plot_scores(curves),
                output / "accuracy.png",
                "Accuracy",
                "Average accuracy of evaluations, during the runs or of their checkpoints, against "
                "tokens, FLOPs and seconds. Dotted lines mark growths.",
            )
        )
    return plots


def _save_plot(figure: Figure, path: Path, title: str, caption: str) -> Plot:
    figure.savefig(path)
    return Plot(path, title, caption)


TEMPLATE = "report.html"


METHOD = (
    "Speedup: sp = FLOPs from scratch / FLOPs grown - 1 at the same loss (arXiv 2405.15319, "
    "equation 48). The fraction of FLOPs saved is 1 - 1 / (1 + sp): an sp of 54.6% saves 35.3%.",
    "A run reaches a loss at the point from which its curve stays at or below that loss. Between "
    "two measurements the loss is interpolated linearly in log FLOPs. A dip before the loss spike "
    "of a growth does not count.",
    "Runs are compared by validation loss, without smoothing, if all of them have it. Otherwise "
    "they are compared by training loss, where each point is the mean over the last "
    f"{SMOOTHING:.0%} of the run's tokens, never across a growth.",
    f"sp is measured at up to {LEVELS} evenly spaced losses, from the highest one that all runs "
    f"have after the first {START_SHARE:.0%} of their FLOPs to the worst of their final losses.",
    "Runs whose configurations differ only in seed, name and directory are one setting. Every "
    "grown run is compared with every run from scratch; the report shows the mean sp over these "
    "pairs, its range (the band) and its sample standard deviation. Pairs share runs, so the "
    "deviation describes the variation between seeds and is not a standard error.",
    f"FLOPs are counted by three accounts. {ACCOUNTS['flops']}: 6 times all parameters of the "
    "current model, for every token; used by all plots that name no other account. "
    f"{ACCOUNTS['flops_charged']}: a token of the base costs its fraction, 1 / g, of the target's "
    "non-embedding parameters. "
    f"{ACCOUNTS['flops_true']}: FLOPs of all matrix products.",
    "Spike: smoothed training loss just before a growth, the highest loss after it until recovery "
    "to that value, and the tokens until recovery.",
)


def render_page(
    title: str, tables: Sequence[Table], findings: Sequence[str], plots: Sequence[Plot]
) -> str:
    """Return the HTML page: first table, findings, other tables, plots, method.

    All text is printable and escaped. The page loads no external resources.
    """
    environment = Environment(
        loader=PackageLoader("megagrow.analysis"),
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(
        title=title, tables=tables, findings=findings, plots=plots, method=METHOD
    )
