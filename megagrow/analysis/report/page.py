"""HTML page of a report, self-contained or live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from megagrow.analysis.curves import SMOOTHING
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.plots import plot_style
from megagrow.analysis.report.content import Report
from megagrow.analysis.report.plots import PlotSection
from megagrow.analysis.report.svg import THEME, inline_svg
from megagrow.analysis.speedup_curve import LEVELS, START_SHARE
from megagrow.errors import printable

METHOD = (
    "Speedup: sp = FLOPs from scratch / FLOPs grown - 1 at the same loss (arXiv 2405.15319, "
    "equation 48). The fraction of FLOPs saved is 1 - 1 / (1 + sp): an sp of 54.6% saves 35.3%.",
    "A run reaches a loss at the point from which its curve stays at or below that loss. Between "
    "two measurements the loss is interpolated linearly in log FLOPs. A dip before the loss spike "
    "of a growth does not count.",
    "Equal cost is the largest cost that all runs reach; the loss there is interpolated linearly.",
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


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """Line of one run in the legend."""

    name: str
    color: str
    dashes: str
    """Value of stroke-dasharray."""


def render_page(report: Report, sections: Sequence[PlotSection]) -> str:
    """Return the self-contained HTML page of a report.

    All text from the runs is printable and escaped. The page loads no external resources.
    """
    return _page(report.title, render_content(report, sections), live=False)


def live_page(content: str) -> str:
    """Return the page of `megagrow watch`; its script refreshes the content periodically."""
    return _page("megagrow watch", content, live=True)


def _page(title: str, content: str, live: bool) -> str:
    template = _environment().get_template("page.html")
    return template.render(title=title, content=content, theme=THEME, live=live)


def render_problem(message: str) -> str:
    """Return the content of a page without a report: a message, escaped."""
    return _environment().get_template("problem.html").render(message=message)


def render_content(report: Report, sections: Sequence[PlotSection]) -> str:
    """Return the content of the page as an HTML fragment."""
    return (
        _environment()
        .get_template("content.html")
        .render(
            report=report,
            legend=_legend(report),
            sections=[(section, _images(section)) for section in sections],
            method=METHOD,
            lines=_lines,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("megagrow.analysis.report"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _legend(report: Report) -> list[LegendEntry]:
    entries = []
    for index, run in enumerate(report.runs):
        style = plot_style(index)
        dashes = () if isinstance(style.line, str) else style.line[1]
        color = next(color.variable for color in THEME if color.light == style.color)
        entries.append(LegendEntry(run.name, color, " ".join(str(2 * part) for part in dashes)))
    return entries


def _images(section: PlotSection) -> Iterator[str]:
    for name, figure in section.panels.items():
        label = f"{figure.axes[0].get_ylabel()} against {figure.axes[0].get_xlabel()}"
        yield inline_svg(section.svgs[name], label)


def _lines(text: str) -> list[str]:
    """Return the lines of a text, with spaces for tabs, which `printable` would escape."""
    return text.expandtabs(4).splitlines()
