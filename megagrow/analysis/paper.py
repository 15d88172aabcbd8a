"""Published results of the paper, and their comparison with runs.

Du et al., "Stacking Your Transformers", NeurIPS 2024, arXiv 2405.15319. paper_results.json contains
the numbers with their table or figure; docs/results/paper-results.md is generated from it:

    python tools/docs/paper_results.py
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.report.tables import Table, as_markdown
from megagrow.analysis.seeds import Matchup, SeedGroup

RESULTS = Path(__file__).with_name("paper_results.json")
OPERATORS = "Operators at 1.1B"
SPEEDUP = "speedup %"
LOSS = "training loss"
AVERAGE = "average of 7 %"
HEAD = """# Published results

{paper}

This page lists the numbers published in the paper; `megagrow report --against paper` compares runs
with them. It is generated from `megagrow/analysis/paper_results.json` by `python
tools/docs/paper_results.py`.
A speedup of 54.6% is 300 / 194 - 1 and means 35.3% fewer FLOPs. By the paper's code, its "1.1B"
model has 1.36B parameters, "3B" 2.40B and "7B" 5.93B. The paper gives no error bars.
"""


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of a table of the paper."""

    name: str
    operator: str | None
    """Name in run files; None for training from scratch and for models of other authors."""
    values: tuple[float, ...]
    """One value per column of the table."""


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table of published results."""

    title: str
    source: str
    """Table, figure or section of the paper."""
    setting: str
    """Model size, tokens and growth of the runs."""
    columns: tuple[str, ...]
    """Task and metric, or another quantity; values of a column that ends in % are in percent."""
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True, slots=True)
class Paper:
    """Citation and result tables of the paper."""

    citation: str
    tables: tuple[PaperTable, ...]


def read_paper() -> Paper:
    """Read the paper's results from paper_results.json."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    tables = tuple(
        PaperTable(
            table["title"],
            table["source"],
            table["setting"],
            tuple(table["columns"]),
            tuple(PaperRow(r["name"], r["operator"], tuple(r["values"])) for r in table["rows"]),
        )
        for table in document["tables"]
    )
    return Paper(document["paper"], tables)


def paper_markdown(paper: Paper) -> str:
    """Return docs/results/paper-results.md: all tables of the paper as Markdown."""
    texts = [as_markdown(_paper_table(table)) for table in paper.tables]
    return "\n".join([HEAD.format(paper=paper.citation + "."), *texts])


def compare_with_paper(matchups: Sequence[Matchup], paper: Paper) -> Table:
    """Return a table with each grown group of runs and the paper's row of the same operator.

    Accuracies and perplexities are those of the last evaluation, averaged over seeds. A cell is `-`
    if the runs did not measure the quantity. The paper's models have another size.
    """
    operators = next(table for table in paper.tables if table.title == OPERATORS)
    rows: list[list[str]] = []
    notes = [
        f"Paper: {operators.source}; {operators.setting}.",
        "Model sizes, data and token counts differ, so these runs do not reproduce the paper's. "
        "The average of a run is taken over the tasks it evaluated; - marks values that were not "
        "measured.",
    ]
    for matchup in matchups:
        name = matchup.grown.operator
        published = [row for row in operators.rows if row.operator == name and name is not None]
        levels = matchup.levels["flops"]
        speedup = f"{100 * levels[-1].mean:.1f}" if levels else "undefined"
        rows.append(_run_row(matchup.grown, operators.columns, speedup))
        rows += [_paper_row(f"paper: {row.name}", row) for row in published]
        if not published:
            notes.append(
                f"{matchup.grown.name}: the paper has no result for its operator "
                f"({name or 'unknown'})."
            )
    scratch: list[SeedGroup] = []
    for matchup in matchups:
        if matchup.scratch not in scratch:
            scratch.append(matchup.scratch)
    rows += [_run_row(group, operators.columns, "0") for group in scratch]
    rows += [_paper_row("paper: scratch", row) for row in operators.rows if row.name == "scratch"]
    columns = ("", "size", *operators.columns)
    return Table("Comparison with the paper's operators", columns, rows, notes)


def _run_row(group: SeedGroup, columns: Sequence[str], speedup: str) -> list[str]:
    fixed = {SPEEDUP: speedup, LOSS: _mean([run.train.loss[-1] for run in group.runs])}
    cells = [fixed.get(column) or _mean_score(group.runs, column) for column in columns]
    return [group.name, f"{group.runs[0].parameters[-1]:,}", *cells]


def _mean_score(runs: Sequence[RunCurves], column: str) -> str:
    """Format the mean of a column in the last evaluations of the runs; `-` if none has it."""
    values = [_score_value(run, column) for run in runs]
    return _mean([value for value in values if value is not None])


def _score_value(run: RunCurves, column: str) -> float | None:
    if not run.scores:
        return None
    last = run.scores[-1]
    if column == AVERAGE:
        return None if last.average is None else 100 * last.average
    task, metric, *_ = column.split()
    names = ("word_perplexity", "perplexity") if metric == "perplexity" else (metric,)
    metrics = last.results.get(task, {})
    value = next((metrics[name] for name in names if name in metrics), None)
    return None if value is None else value * (100 if column.endswith("%") else 1)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4g}" if values else "-"


def _paper_row(name: str, row: PaperRow) -> list[str]:
    return [name, "1.1B", *map(_number, row.values)]


def _number(value: float) -> str:
    return f"{value:g}"


def _paper_table(table: PaperTable) -> Table:
    rows = [[row.name, row.operator or "-", *map(_number, row.values)] for row in table.rows]
    columns = ("", "operator", *table.columns)
    return Table(table.title, columns, rows, (f"{table.source}.", f"{table.setting}."))
