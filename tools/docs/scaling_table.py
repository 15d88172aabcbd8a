"""Writes the tables of docs/results/scaling.md: every published throughput beside what the model
gives.

python tools/docs/scaling_table.py          writes them
python tools/docs/scaling_table.py --check  ends with 1 if they are not current
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.planning.published import Published, published_rows, published_sources  # noqa: E402

PAGE = ROOT / "docs/results/scaling.md"
BEGIN, END = "<!-- tables: tools/docs/scaling_table.py -->", "<!-- end of the tables -->"
ROLES = ("set", "held out", "fresh")
GOAL = 0.15


def tables() -> str:
    """All tables, as Markdown."""
    rows = published_rows()
    return "\n".join([*_summary(rows), "", *_sources(rows)])


def with_tables(page: str) -> str:
    """The page with its tables written anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def within(rows: Sequence[Published], limit: float) -> int:
    """How many of the rows are met within `limit`."""
    return sum(abs(row.error) <= limit for row in rows)


def one_mfu_within(rows: Sequence[Published], limit: float) -> int:
    """How many of the rows would be met by one utilisation for all rows of the same card, the
    median of what those rows themselves reached."""
    reached = {
        name: median(_mfu(row) for row in published_rows() if row.cluster.gpu.name == name)
        for name in {row.cluster.gpu.name for row in rows}
    }
    return sum(abs(reached[row.cluster.gpu.name] / _mfu(row) - 1) <= limit for row in rows)


def _mfu(row: Published) -> float:
    return row.tokens_per_gpu * row.work.shape.flops_per_token / row.cluster.gpu.peak_flops


def _summary(rows: Sequence[Published]) -> Iterator[str]:
    yield (
        "| rows | all | within 15% | within 10% | median error | worst | GPUs | parameters "
        "| one MFU per card: within 15% |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for role in ROLES:
        yield _summed(role, [row for row in rows if row.role == role])
    for source, group in groupby(rows, lambda row: row.source):
        yield _summed(source, [row for row in group if row.role != "set"])


def _summed(name: str, rows: Sequence[Published]) -> str:
    errors = [abs(row.error) for row in rows]
    gpus = [row.work.gpus for row in rows]
    sizes = [row.work.shape.parameters for row in rows]
    cells = [
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
    return f"| {' | '.join(cells)} |"


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _sources(rows: Sequence[Published]) -> Iterator[str]:
    about = {each["name"]: each for each in published_sources()}
    for source, group in groupby(rows, lambda row: row.source):
        yield f"### {source}"
        yield ""
        yield f"<{about[source]['address']}>: {about[source]['note']}."
        yield ""
        yield (
            "| model | tokens | GPUs | TP | ZeRO | micro batches | done twice | published "
            "| predicted | error | row |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|---|"
        yield from (_row(row) for row in group)
        yield ""


def _row(row: Published) -> str:
    work, error = row.work, f"{row.error:+.1%}"
    cells = [
        row.model,
        f"{work.shape.sequence}",
        f"{work.gpus}",
        f"{work.tp}",
        f"{work.zero_stage}",
        f"{work.accumulation} x {work.micro_batch}",
        f"{work.recomputed:g}",
        f"{row.tokens_per_gpu:,.0f}",
        f"{row.predicted.tokens_per_gpu:,.0f}",
        error if abs(row.error) <= GOAL else f"**{error}**",
        row.role,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Writes or checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    current = with_tables(page)
    if parser.parse_args().check:
        if page == current:
            return 0
        print(
            "docs/results/scaling.md is not current: python tools/docs/scaling_table.py",
            file=sys.stderr,
        )
        return 1
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
