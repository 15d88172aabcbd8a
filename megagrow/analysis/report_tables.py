"""The tables of a report, once as cells, and as Markdown; the page writes the same as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.growth_transient import spikes
from megagrow.analysis.seeds import Matchup
from megagrow.analysis.speedup_curve import Level
from megagrow.common.tables import escape_markdown, markdown_table


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, columns and rows of text, and what must be said of them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def summary(runs: Sequence[RunCurves]) -> Table:
    """A row for each run: what it was and where it ended."""
    columns = (
        *("run", "seed", "parameters", "tokens", "FLOPs (6 N)", "FLOPs (true)", "seconds"),
        *("training loss", "validation loss", "accuracy"),
    )
    return Table("Runs", columns, [_summary(run) for run in runs])


def speedups(matchups: Sequence[Matchup]) -> Table:
    """The speedup at the lowest shared loss, by each account of FLOPs."""
    columns = (
        *("grown", "from scratch", "FLOPs counted as", "at equal loss", "sp", "over seeds"),
        "fewer FLOPs",
    )
    rows, notes = [], []
    for one in matchups:
        for account, levels in one.levels.items():
            found = _found(levels[-1]) if levels else ("-", "undefined", "-", "-")
            rows.append([one.grown.name, one.scratch.name, ACCOUNTS[account], *found])
        notes += _notes(one)
    return Table("Speedup at the lowest loss that both reach", columns, rows, notes)


def growths(runs: Sequence[RunCurves]) -> Table:
    """What each growth did to the training loss, and what it took until it was back."""
    columns = (
        *("run", "into stage", "operator", "at tokens", "loss before", "peak after", "spike"),
        "tokens until back",
    )
    rows = [
        [
            run.name,
            str(spike.growth.stage),
            spike.growth.operator or "-",
            f"{spike.growth.tokens:,}",
            f"{spike.before:.4f}",
            f"{spike.peak:.4f}",
            f"{spike.peak - spike.before:+.4f}",
            "not in its stage"
            if spike.tokens_until_back is None
            else f"{spike.tokens_until_back:,}",
        ]
        for run in runs
        for spike in spikes(run)
    ]
    return Table("Growths", columns, rows)


def scores(runs: Sequence[RunCurves]) -> Table:
    """The last evaluation of each run, a row for each task and metric."""
    last = [run.scores[-1].results if run.scores else {} for run in runs]
    kinds = dict.fromkeys(
        (task, metric) for found in last for task, metrics in found.items() for metric in metrics
    )
    rows = [
        [task, metric, *(_cell(found.get(task, {}).get(metric)) for found in last)]
        for task, metric in kinds
        if not metric.endswith("_stderr")
    ]
    return Table("Last evaluation", ("task", "metric", *(run.name for run in runs)), rows)


def as_markdown(table: Table) -> str:
    """The table under its heading, what comes from files unable to end a cell or begin a tag."""
    columns, *rows = [[*map(escape_markdown, cells)] for cells in (table.columns, *table.rows)]
    notes = [f"- {escape_markdown(note)}" for note in table.notes]
    body = [markdown_table(columns, rows), *([""] if notes else []), *notes]
    return "\n".join([f"## {table.title}", "", *body, ""])


def _summary(run: RunCurves) -> list[str]:
    averages = [score.average for score in run.scores if score.average is not None]
    return [
        run.name,
        str(run.seed),
        " -> ".join(f"{count:,}" for count in run.parameters),
        f"{run.tokens:,}",
        f"{run.flops:.3e}",
        f"{run.flops_true:.3e}",
        f"{run.seconds:,.0f}",
        f"{run.train.loss[-1]:.4f}",
        f"{run.validation.loss[-1]:.4f}" if run.validation.loss else "-",
        f"{averages[-1]:.1%}" if averages else "-",
    ]


def _found(level: Level) -> tuple[str, str, str, str]:
    low, high, deviation = min(level.speedups), max(level.speedups), level.deviation
    spread = "one seed, no error bar"
    if deviation is not None:
        spread = f"{low:+.1%} to {high:+.1%}, s.d. {deviation:.1%}, {len(level.speedups)} pairs"
    return f"{level.loss:.4f}", f"{level.mean:+.1%}", spread, f"{level.saved:.1%}"


def _notes(matchup: Matchup) -> list[str]:
    names = f"{matchup.grown.name} against {matchup.scratch.name}"
    notes = [f"{names}: compared by {matchup.kind} loss."]
    if not matchup.levels["flops"]:
        notes.append(
            f"{names}: they share no {matchup.kind} loss that both pass, so there is no speedup "
            "to tell."
        )
    if "flops_charged" not in matchup.levels:
        notes.append(f"{names}: without config.yaml beside the records, no paper's charge.")
    return notes


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
