"""Load the runs of a report; write it into a folder, or print it."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megagrow.analysis.plots import plot_runs
from megagrow.analysis.report.content import Report, make_report
from megagrow.analysis.report.document import as_document
from megagrow.analysis.report.page import render_page
from megagrow.analysis.report.plots import PlotSection, plot_sections
from megagrow.analysis.report.tables import as_markdown, origin_table, run_table
from megagrow.common.json_text import format_json
from megagrow.common.tables import escape_markdown, print_lines, print_table
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics

PAGE, MARKDOWN, DOCUMENT, PLOT = "report.html", "report.md", "report.json", "loss.png"


def load_report(directories: Sequence[Path], against_paper: bool = False) -> Report:
    """Load the runs in these directories, finished or not.

    Raises InputError if a run is missing or damaged, or has no training loss.
    """
    recorded = ((path, read_metrics(path / METRICS_FILE)) for path in directories)
    return make_report(recorded, against_paper)


def write_report(report: Report, output: Path) -> None:
    """Write a report into the folder `output`.

    The files are report.html (self-contained), report.md, report.json, the plots as SVGs, and the
    first ones in one PNG.
    """
    output.mkdir(parents=True, exist_ok=True)
    sections = list(plot_sections(report))
    (output / PAGE).write_text(render_page(report, sections), encoding="utf-8")
    (output / DOCUMENT).write_text(format_json(as_document(report)), encoding="utf-8")
    (output / MARKDOWN).write_text(_markdown(report), encoding="utf-8")
    plot_runs(report.runs, output / PLOT, report.speedup)
    _write_plots(sections, output)


def print_report(report: Report, console: Console) -> None:
    """Print the conclusion, its limits, and a table of the runs."""
    print_lines(console, [*report.conclusion, *report.missing])
    runs, origins = run_table(report.runs), origin_table(report.runs)
    heading, *rows = zip(runs.columns, *runs.rows, strict=True)
    _, *origin_rows = zip(origins.columns, *origins.rows, strict=True)
    print_table(console, heading, [*rows, *origin_rows])


def _write_plots(sections: Sequence[PlotSection], output: Path) -> None:
    for section in sections:
        for name, svg in section.svgs.items():
            (output / f"{name}.svg").write_text(svg, encoding="utf-8")


def _markdown(report: Report) -> str:
    lines = [f"# {escape_markdown(report.title)}", ""]
    lines += [escape_markdown(" ".join(report.conclusion)), ""]
    lines += [f"- {escape_markdown(line)}" for line in report.missing]
    lines += ["", f"![loss]({PLOT})", "", *map(as_markdown, report.tables)]
    return "\n".join(lines)
