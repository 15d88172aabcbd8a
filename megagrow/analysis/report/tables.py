"""Tables of a report as text cells, and their Markdown form; the HTML page uses the same cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.equal_cost import COST_AXES, EqualCost
from megagrow.analysis.flop_accounting import ACCOUNTS
from megagrow.analysis.growth_transient import spikes
from megagrow.analysis.mixing import MixingTimes
from megagrow.analysis.seeds import Matchup
from megagrow.analysis.speedup_curve import Level, LossKind
from megagrow.common.sizes import format_duration
from megagrow.common.tables import escape_markdown, markdown_table
from megagrow.config.sections import UNNAMED_SET


@dataclass(frozen=True, slots=True)
class Table:
    """Table of text cells with a title and notes."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def run_table(runs: Sequence[RunCurves]) -> Table:
    """Return a table with one row per run: size, cost and latest losses."""
    columns = (
        *("run", "seed", "parameters", "steps", "tokens", "FLOPs (6 N)", "FLOPs (true)"),
        *("training time", "training loss", "validation loss", "accuracy"),
    )
    return Table("Runs", columns, [_run_cells(run) for run in runs])


def origin_table(runs: Sequence[RunCurves]) -> Table:
    """Return a table of the date of the last start, hardware and software of each run."""
    rows = [[run.name, run.origin.date, run.origin.hardware, run.origin.software] for run in runs]
    return Table("Date and hardware", ("run", "last start", "hardware", "software"), rows)


def equal_cost_table(equal: Sequence[EqualCost], kind: LossKind) -> Table:
    """Return a table of the losses at equal FLOPs, tokens and training time, best first."""
    columns = ("equal", "at", "setting", f"{kind} loss", "above the best", "over seeds")
    rows = [
        [
            COST_AXES[one.axis],
            _cost(one),
            group.name,
            f"{group.mean:.4f}",
            f"{group.mean - one.best.mean:+.4f}",
            f"{min(group.losses):.4f} to {max(group.losses):.4f}" if group.losses[1:] else "-",
        ]
        for one in equal
        for group in one.groups
    ]
    return Table("Loss at equal cost", columns, rows)


def speedup_table(matchups: Sequence[Matchup]) -> Table:
    """Return a table of the speedup at the lowest shared loss, by each account of FLOPs."""
    columns = (
        *("grown", "from scratch", "FLOPs account", "equal loss", "sp", "sp over seeds"),
        "FLOPs saved",
    )
    rows, notes = [], []
    for matchup in matchups:
        for account, levels in matchup.levels.items():
            cells = _level_cells(levels[-1]) if levels else ("-", "undefined", "-", "-")
            rows.append([matchup.grown.name, matchup.scratch.name, ACCOUNTS[account], *cells])
        notes += _notes(matchup)
    return Table("Speedup at the lowest loss reached by both", columns, rows, notes)


def validation_table(runs: Sequence[RunCurves]) -> Table:
    """Return a table of the last loss on each validation set, if a run has named sets."""
    last = [{name: each.loss[-1] for name, each in run.validation_sets.items()} for run in runs]
    names = dict.fromkeys(name for losses in last for name in losses)
    shown = names if names.keys() - {UNNAMED_SET} else {}
    rows = [[name, *(_cell(losses.get(name)) for losses in last)] for name in shown]
    return Table("Last validation losses", ("set", *(run.name for run in runs)), rows)


def mixing_table(mixings: Sequence[MixingTimes]) -> Table:
    """Return a table of the tokens from the last growth until a grown run meets the other run."""
    columns = (
        *("grown", "fixed size", "growth at tokens", "tokens after it", "mixing time, tokens"),
        *("over seeds", "loss difference at the end"),
    )
    rows = []
    for mixing in mixings:
        matchup, met, several = mixing.matchup, mixing.met, len(mixing.pairs) > 1
        rows.append(
            [
                matchup.grown.name,
                matchup.scratch.name,
                f"{matchup.grown.runs[0].growths[-1].tokens:,}",
                f"{mixing.shared_tokens:,}",
                "not within the run" if mixing.tokens is None else f"{mixing.tokens:,.0f}",
                f"{min(met):,.0f} to {max(met):,.0f}, {len(met)} of {len(mixing.pairs)} pairs"
                if several and met
                else "-",
                f"{mixing.gap:+.4f}",
            ]
        )
    notes = [f"{one.matchup.grown.name}: compared by {one.matchup.kind} loss." for one in mixings]
    return Table("Mixing time: equal loss at equal tokens after the growth", columns, rows, notes)


def growth_table(runs: Sequence[RunCurves]) -> Table:
    """Return a table of the loss spike of each growth and the tokens until recovery."""
    columns = (
        *("run", "stage", "operator", "at tokens", "of FLOPs", "loss before", "peak loss", "spike"),
        "tokens to recover",
    )
    rows = [
        [
            run.name,
            str(spike.growth.stage),
            spike.growth.operator or "-",
            f"{spike.growth.tokens:,}",
            f"{spike.growth.flops / run.flops:.1%}",
            f"{spike.before:.4f}",
            f"{spike.peak:.4f}",
            f"{spike.peak - spike.before:+.4f}",
            "not in this stage" if spike.recovery_tokens is None else f"{spike.recovery_tokens:,}",
        ]
        for run in runs
        for spike in spikes(run)
    ]
    return Table("Growths", columns, rows)


def score_table(runs: Sequence[RunCurves]) -> Table:
    """Return a table of the last evaluation of each run, one row per task and metric."""
    last = [run.scores[-1].results if run.scores else {} for run in runs]
    kinds = dict.fromkeys(
        (task, metric)
        for results in last
        for task, metrics in results.items()
        for metric in metrics
    )
    rows = [
        [task, metric, *(_cell(results.get(task, {}).get(metric)) for results in last)]
        for task, metric in kinds
        if not metric.endswith("_stderr")
    ]
    return Table("Last evaluation", ("task", "metric", *(run.name for run in runs)), rows)


def as_markdown(table: Table) -> str:
    """Return the table as Markdown under its heading; cells are escaped for Markdown and HTML."""
    columns, *rows = [[*map(escape_markdown, cells)] for cells in (table.columns, *table.rows)]
    notes = [f"- {escape_markdown(note)}" for note in table.notes]
    body = [markdown_table(columns, rows), *([""] if notes else []), *notes]
    return "\n".join([f"## {table.title}", "", *body, ""])


def _run_cells(run: RunCurves) -> list[str]:
    averages = [score.average for score in run.scores if score.average is not None]
    return [
        run.name,
        str(run.seed),
        " -> ".join(f"{count:,}" for count in run.parameters),
        f"{run.step:,}" if run.finished else f"{run.step:,} of {run.planned_steps:,}",
        f"{run.tokens:,}",
        f"{run.flops:.3e}",
        f"{run.flops_true:.3e}",
        format_duration(run.seconds),
        f"{run.train.loss[-1]:.4f}",
        f"{run.validation.loss[-1]:.4f}" if run.validation.loss else "-",
        f"{averages[-1]:.1%}" if averages else "-",
    ]


def _level_cells(level: Level) -> tuple[str, str, str, str]:
    low, high, deviation = min(level.speedups), max(level.speedups), level.deviation
    spread = "one seed, no error bar"
    if deviation is not None:
        spread = f"{low:+.1%} to {high:+.1%}, s.d. {deviation:.1%}, {len(level.speedups)} pairs"
    return f"{level.loss:.4f}", f"{level.mean:+.1%}", spread, f"{level.saved:.1%}"


def _notes(matchup: Matchup) -> list[str]:
    names = f"{matchup.grown.name} and {matchup.scratch.name}"
    notes = [f"{names}: compared by {matchup.kind} loss."]
    if "flops_charged" not in matchup.levels:
        notes.append(
            f"{names}: a run directory has no config.yaml, so FLOPs by the paper's charge are "
            "unknown."
        )
    return notes


def _cost(equal: EqualCost) -> str:
    if equal.axis == "seconds":
        return format_duration(equal.at)
    return f"{equal.at:,.0f}" if equal.axis == "tokens" else f"{equal.at:.3e}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
