"""Self-contained HTML page of a report: tables, plots as data URIs, and the method."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megagrow.analysis.curves import SMOOTHING
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.report_tables import Table
from megagrow.analysis.speedup_curve import LEVELS, START_SHARE

TEMPLATE = "report.html"
METHOD = (
    "Speedup: sp = FLOPs from scratch / FLOPs grown - 1 at the same loss (arXiv 2405.15319, "
    "equation 48). The fraction of FLOPs saved is 1 - 1 / (1 + sp): an sp of 54.6% saves 35.3%.",
    "A run reaches a loss at the end of the last segment of its curve above that loss. Between two "
    "measurements the loss is interpolated linearly in log FLOPs. A dip before the loss spike of a "
    "growth does not count.",
    "Runs are compared by validation loss, without smoothing, if all of them have it. Otherwise "
    "they are compared by training loss, where each point is the mean over the last "
    f"{SMOOTHING:.0%} of the run's tokens, never across a growth.",
    f"sp is measured at up to {LEVELS} evenly spaced losses, from the highest one that all runs "
    f"have after the first {START_SHARE:.0%} of their FLOPs to the worst of their final losses.",
    "Runs whose configurations differ only in seed, name and directory are one setting. Every "
    "grown run is compared with every run from scratch; reported are the mean sp over these pairs, "
    "its range (the band) and its sample standard deviation. Pairs share runs, so the deviation "
    "describes the variation between seeds and is not a standard error.",
    f"FLOPs are counted by three accounts. {ACCOUNTS['flops']}: 6 times all parameters of the "
    "current model, for every token; used by all plots that name no other account. "
    f"{ACCOUNTS['flops_charged']}: a token of the base costs its fraction, 1 / g, of the target's "
    "non-embedding parameters. "
    f"{ACCOUNTS['flops_true']}: FLOPs of all matrix products.",
    "Spike: smoothed training loss just before a growth, the highest loss after it until recovery "
    "to that value, and the tokens until recovery.",
)


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


def render_page(
    title: str, tables: Sequence[Table], findings: Sequence[str], plots: Sequence[Plot]
) -> str:
    """Return the HTML page: first table, findings, other tables, plots, method.

    All text is escaped. The page loads no external resources.
    """
    environment = Environment(
        loader=PackageLoader("megagrow.analysis"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(
        title=title, tables=tables, findings=findings, plots=plots, method=METHOD
    )
