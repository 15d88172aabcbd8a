"""One HTML page that needs nothing but itself: tables, plots as data URIs, the method in words."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megagrow.analysis.curves import SMOOTHING
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.report_tables import Table
from megagrow.analysis.speedup_curve import LEVELS, START

TEMPLATE = "report.html"
METHOD = (
    "Speedup: sp = FLOPs from scratch / FLOPs grown - 1 at the same loss (arXiv 2405.15319, "
    "equation 48). It is not the share of FLOPs saved, 1 - 1 / (1 + sp): an sp of 54.6% saves "
    "35.3%.",
    "A run has reached a loss where its curve first gets there and stays, that is, where its last "
    "stretch above that loss ends; between two measurements the loss is taken as linear in log "
    "FLOPs. A dip before the spike of a growth does not count.",
    "Runs are compared by validation loss where all of them have it, as it was measured; else by "
    f"training loss, each point the mean over the last {SMOOTHING:.0%} of the run's tokens and "
    "never across a growth.",
    f"Along the curve, sp is measured at up to {LEVELS} evenly spaced losses, from the highest one "
    f"that all runs have after the first {START:.0%} of their FLOPs to the worst of their final "
    "ones.",
    "Runs whose configurations differ by nothing but seed, name and directory are told as one: "
    "every grown run is set against every run from scratch, and the mean sp, its range (the band) "
    "and its sample standard deviation over these pairs are told. Pairs share runs: the deviation "
    "describes the seeds and is no standard error.",
    f"FLOPs are counted in three ways. {ACCOUNTS['flops']}: 6 times all parameters of the model "
    "of the moment, for every token; the account of the plots where they name no other. "
    f"{ACCOUNTS['flops_charged']}: a token of the base costs its share of the target's parameters "
    "outside the embeddings, 1 / g. "
    f"{ACCOUNTS['flops_true']}: the matrix products that are really done.",
    "Spike: the smoothed training loss just before a growth, the highest one after it until the "
    "loss is back, and the tokens until then.",
)


@dataclass(frozen=True, slots=True)
class Plot:
    """A PNG of the report, and what it shows."""

    path: Path
    title: str
    caption: str

    @property
    def base64(self) -> str:
        """The file's bytes as a data URI holds them."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


def render_page(
    title: str, tables: Sequence[Table], findings: Sequence[str], plots: Sequence[Plot]
) -> str:
    """The page: the first table, what was found in words, the other tables, the plots, the method.

    All text is escaped. Nothing in the page is loaded from elsewhere.
    """
    environment = Environment(
        loader=PackageLoader("megagrow.analysis"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(
        title=title, tables=tables, findings=findings, plots=plots, method=METHOD
    )
