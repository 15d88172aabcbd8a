"""Write the tables of docs/results/scaling.md: published and predicted throughputs.

python tools/docs/scaling_table.py          update the page
python tools/docs/scaling_table.py --check  exit with code 1 if the page is out of date
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.common.tables import markdown_table  # noqa: E402
from megagrow.planning.published import Published, published_rows, published_sources  # noqa: E402
from tools.docs.generated_page import write_or_check  # noqa: E402

PAGE = ROOT / "docs/results/scaling.md"
BEGIN, END = "<!-- tables: tools/docs/scaling_table.py -->", "<!-- end of the tables -->"
ROLES = ("set", "held out", "fresh")
GOAL = 0.15


def tables() -> str:
    """Return all tables as Markdown."""
    rows = published_rows()
    return "\n".join([_summary(rows), "", *_sources(rows)])


def with_tables(page: str) -> str:
    """Return the page with up-to-date tables."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def within(rows: Sequence[Published], limit: float) -> int:
    """Return the number of rows predicted within `limit`."""
    return sum(abs(row.error) <= limit for row in rows)


def one_mfu_within(rows: Sequence[Published], limit: float) -> int:
    """Return the number of rows within `limit` for a constant MFU per GPU type.

    The MFU is the median over all rows of the same GPU type.
    """
    medians = {
        name: median(_mfu(row) for row in published_rows() if row.cluster.gpu.name == name)
        for name in {row.cluster.gpu.name for row in rows}
    }
    return sum(abs(medians[row.cluster.gpu.name] / _mfu(row) - 1) <= limit for row in rows)


def _mfu(row: Published) -> float:
    return row.tokens_per_gpu * row.work.shape.flops_per_token / row.cluster.gpu.peak_flops


SUMMARY_COLUMNS = (
    *("rows", "count", "within 15%", "within 10%", "median error", "largest error", "GPUs"),
    *("parameters", "constant MFU: within 15%"),
)

SOURCE_COLUMNS = (
    *("model", "sequence length", "GPUs", "TP", "PP", "ZeRO", "micro-batches", "checkpointing"),
    *("published, tokens/s", "predicted, tokens/s", "error", "row"),
)


def _summary(rows: Sequence[Published]) -> str:
    cells = [_summary_row(role, [row for row in rows if row.role == role]) for role in ROLES]
    for source, group in groupby(rows, lambda row: row.source):
        cells.append(_summary_row(source, [row for row in group if row.role != "set"]))
    return markdown_table(SUMMARY_COLUMNS, cells)


def _summary_row(name: str, rows: Sequence[Published]) -> list[str]:
    errors = [abs(row.error) for row in rows]
    gpus = [row.work.gpus for row in rows]
    sizes = [row.work.shape.parameters for row in rows]
    return [
        name,
        f"{len(rows)}",
        f"{within(rows, GOAL)}",
        f"{within(rows, 0.1)}",
        f"{median(errors):.1%}",
        f"{max(errors):.1%}",
        _range(f"{min(gpus)}", f"{max(gpus)}"),
        _range(f"{min(sizes) / 1e9:.1f}B", f"{max(sizes) / 1e9:.1f}B"),
        f"{one_mfu_within(rows, GOAL)}",
    ]


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _sources(rows: Sequence[Published]) -> Iterator[str]:
    sources = {each["name"]: each for each in published_sources()}
    for source, group in groupby(rows, lambda row: row.source):
        yield f"### {source}"
        yield ""
        yield f"<{sources[source]['address']}>: {sources[source]['note']}."
        yield ""
        yield markdown_table(SOURCE_COLUMNS, map(_row, group))
        yield ""


def _row(row: Published) -> list[str]:
    work, error = row.work, f"{row.error:+.1%}"
    return [
        row.model,
        f"{work.shape.sequence}",
        f"{work.gpus}",
        f"{work.tp}",
        f"{work.pp}" if work.split is None else f"{work.pp} x {work.split.chunks_per_rank}",
        f"{work.zero_stage}",
        f"{work.accumulation} x {work.micro_batch}",
        f"{work.recomputed:g}",
        f"{row.tokens_per_gpu:,.0f}",
        f"{row.predicted.tokens_per_gpu:,.0f}",
        error if abs(row.error) <= GOAL else f"**{error}**",
        row.role,
    ]


def main() -> int:
    """Write or check the page and return the exit code."""
    return write_or_check(PAGE, with_tables, "tools/docs/scaling_table.py")


if __name__ == "__main__":
    sys.exit(main())
