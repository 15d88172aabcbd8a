"""The results that the paper prints, and runs of ours beside them.

Du et al., "Stacking Your Transformers", NeurIPS 2024, arXiv 2405.15319. paper_results.json holds
the numbers with the table or figure that each is from; docs/results/paper-results.md is written
from it:

    python tools/docs/paper_results.py
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.report_tables import Table, as_markdown
from megagrow.analysis.seeds import Matchup, SeedGroup

RESULTS = Path(__file__).with_name("paper_results.json")
OPERATORS = "Operators at 1.1B"
SPEEDUP = "speedup %"
LOSS = "training loss"
AVERAGE = "average of 7 %"
HEAD = """# What the paper reports

{paper}

Numbers as they are printed there, for comparison; `megagrow report --against paper` puts runs
beside them. Written from `megagrow/analysis/paper_results.json` by `python
tools/docs/paper_results.py`.
A speedup of 54.6% is 300 / 194 - 1 and means 35.3% fewer FLOPs. The paper's "1.1B" has 1.36B
parameters, "3B" 2.40B, "7B" 5.93B, by its code. No number there has an error bar.
"""


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of a table of the paper."""

    name: str
    operator: str | None
    """As run files name it; None for training from scratch and for models of others."""
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper, with where it stands there."""

    title: str
    source: str
    setting: str
    columns: tuple[str, ...]
    """Task and metric, or what else is measured; those that end in % are in percent."""
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True, slots=True)
class Paper:
    """All that is kept of it."""

    citation: str
    tables: tuple[PaperTable, ...]


def read_paper() -> Paper:
    """The paper's results, from the file that the package brings along."""
    whole = json.loads(RESULTS.read_text(encoding="utf-8"))
    tables = tuple(
        PaperTable(
            one["title"],
            one["source"],
            one["setting"],
            tuple(one["columns"]),
            tuple(PaperRow(r["name"], r["operator"], tuple(r["values"])) for r in one["rows"]),
        )
        for one in whole["tables"]
    )
    return Paper(whole["paper"], tables)


def paper_markdown(paper: Paper) -> str:
    """The document of all its tables."""
    texts = [as_markdown(_told(table)) for table in paper.tables]
    return "\n".join([HEAD.format(paper=paper.citation + "."), *texts])


def beside_paper(matchups: Sequence[Matchup], paper: Paper) -> Table:
    """Our settings and the paper's row of the same operator, column by column.

    Accuracies and perplexities are those of the last evaluation, the mean over seeds; a cell
    is `-` where a run did not measure what the paper did. The paper's runs are of another size.
    """
    operators = next(table for table in paper.tables if table.title == OPERATORS)
    rows: list[list[str]] = []
    notes = [
        f"Paper: {operators.source}; {operators.setting}.",
        "Sizes, data and tokens differ: the rows say what the operator did there and here, and "
        "are no reproduction of each other. Our average is that of the tasks evaluated; what "
        "was not measured is -.",
    ]
    for matchup in matchups:
        name = matchup.grown.operator
        printed = [row for row in operators.rows if row.operator == name and name is not None]
        levels = matchup.levels["flops"]
        speedup = f"{100 * levels[-1].mean:.1f}" if levels else "undefined"
        rows.append(_ours(matchup.grown, operators.columns, speedup))
        rows += [_printed(f"paper: {row.name}", row) for row in printed]
        if not printed:
            notes.append(
                f"{matchup.grown.name}: the paper has no row of its operator ({name or 'unknown'})."
            )
    scratch: list[SeedGroup] = []
    for matchup in matchups:
        if matchup.scratch not in scratch:
            scratch.append(matchup.scratch)
    rows += [_ours(group, operators.columns, "0") for group in scratch]
    rows += [_printed("paper: scratch", row) for row in operators.rows if row.name == "scratch"]
    return Table("Beside the paper's operators", ("", "size", *operators.columns), rows, notes)


def _ours(group: SeedGroup, columns: Sequence[str], speedup: str) -> list[str]:
    known = {SPEEDUP: speedup, LOSS: _mean([run.train.loss[-1] for run in group.runs])}
    measured = [known.get(column) or _measured(group.runs, column) for column in columns]
    return [group.name, f"{group.runs[0].parameters[-1]:,}", *measured]


def _measured(runs: Sequence[RunCurves], column: str) -> str:
    """The mean of a column over the runs that evaluated it at their end, `-` where none did."""
    found = [_value(run, column) for run in runs]
    return _mean([value for value in found if value is not None])


def _value(run: RunCurves, column: str) -> float | None:
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


def _printed(name: str, row: PaperRow) -> list[str]:
    return [name, "1.1B", *map(_number, row.values)]


def _number(value: float) -> str:
    return f"{value:g}"


def _told(table: PaperTable) -> Table:
    rows = [[row.name, row.operator or "-", *map(_number, row.values)] for row in table.rows]
    columns = ("", "operator", *table.columns)
    return Table(table.title, columns, rows, (f"{table.source}.", f"{table.setting}."))
