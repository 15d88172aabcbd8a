"""Comparison of grown runs with runs from scratch: table, speedup, plot, JSON and Markdown."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megagrow.analysis.curves import RunCurves, load_curves
from megagrow.analysis.plots import plot_runs
from megagrow.analysis.seeds import group_runs, match_groups, no_counterpart
from megagrow.analysis.speedup import Speedup, measure_speedup
from megagrow.analysis.speedup_curve import LossKind, loss_kind
from megagrow.common.tables import escape_markdown, markdown_table, print_lines, print_table
from megagrow.errors import DataError

PLOT = "loss_vs_flops.png"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of a grown run with a run from scratch that ends in the same model."""

    grown: RunCurves
    scratch: RunCurves
    kind: LossKind
    speedup: Speedup | None
    """None if it is undefined, see `measure_speedup`."""


def load_runs(directories: Sequence[Path]) -> list[RunCurves]:
    """Load the finished runs in these directories; runs of the same name get the path appended.

    Raises InputError if a run is missing or unfinished.
    """
    return _with_unique_names(directories, [load_curves(directory) for directory in directories])


def compare_runs(curves: Sequence[RunCurves], output: Path, console: Console) -> list[Comparison]:
    """Compare every grown run with a run from scratch that ends in the same model.

    The order of the runs does not matter; all are listed and plotted. A run without growth counts
    as from scratch, unless it starts from a model (`init_from`) or fine-tunes one. Prints the table
    and the summary lines, and writes comparison.json, comparison.md and loss_vs_flops.png into
    `output`. Raises InputError if no run grew, or a grown run has no counterpart.
    """
    comparisons = [_compare_with_scratch(run, curves) for run in curves if run.grown]
    if not comparisons:
        raise DataError("none of the runs grew from initial weights; pass at least one such run")
    output.mkdir(parents=True, exist_ok=True)
    closing = closing_lines(curves, comparisons)
    plot_runs(curves, output / PLOT, comparisons[0].speedup)
    (output / "comparison.md").write_text(_markdown(curves, closing), encoding="utf-8")
    (output / "comparison.json").write_text(_json(curves, comparisons), encoding="utf-8")
    print_table(console, *_table(curves))
    print_lines(console, [*closing, f"Plot: {output / PLOT}"])
    return comparisons


def compare_pair(grown: RunCurves, scratch: RunCurves) -> Comparison:
    """Compare two runs by validation loss, or by smoothed training loss if one has none."""
    kind = loss_kind([grown, scratch])
    series = [run.validation if kind == "validation" else run.train for run in (scratch, grown)]
    return Comparison(grown, scratch, kind, measure_speedup(*(one.curve() for one in series)))


def closing_lines(curves: Sequence[RunCurves], comparisons: Sequence[Comparison]) -> list[str]:
    """Return the summary of the comparisons as sentences."""
    lines = [line for comparison in comparisons for line in _summary_lines(comparison)]
    if all(matchup.single for matchup in match_groups(group_runs(curves))):
        lines.append("Every setting was run with one seed: there are no error bars.")
    return lines


def _summary_lines(comparison: Comparison) -> list[str]:
    grown, scratch, result = comparison.grown, comparison.scratch, comparison.speedup
    if result is None:
        return [
            f"{grown.name}, {scratch.name}: no {comparison.kind} loss is passed by both runs, so "
            "the speedup is undefined."
        ]
    verdict = "faster" if result.speedup > 0 else "not faster"
    saved = f"{abs(result.saved):.1%} {'fewer' if result.saved >= 0 else 'more'} FLOPs"
    return [
        f"Final {comparison.kind} loss: {grown.name} {result.final_grown:.4f} after "
        f"{grown.flops:.3e} FLOPs, {scratch.name} {result.final_scratch:.4f} after "
        f"{scratch.flops:.3e} FLOPs.",
        f"At equal loss {result.loss:.4f}: {grown.name} needed {result.flops_grown:.3e} FLOPs, "
        f"base included, {scratch.name} {result.flops_scratch:.3e}.",
        f"Speedup sp = {result.speedup:+.1%} ({saved}): growth was {verdict}.",
    ]


def _compare_with_scratch(grown: RunCurves, runs: Sequence[RunCurves]) -> Comparison:
    size = grown.parameters[-1]
    candidates = [run for run in runs if run.from_scratch and run.parameters[-1] == size]
    if candidates:
        return compare_pair(grown, min(candidates, key=lambda run: run.seed != grown.seed))
    raise no_counterpart(grown)


def _with_unique_names(paths: Sequence[Path], runs: Sequence[RunCurves]) -> list[RunCurves]:
    """Append the directory to the names of runs of the same name."""
    counts = Counter(run.name for run in runs)
    return [
        run if counts[run.name] == 1 else replace(run, name=f"{run.name} ({path})")
        for path, run in zip(paths, runs, strict=True)
    ]


def _rows(runs: Sequence[RunCurves]) -> dict[str, list[str]]:
    """Return the rows of the table: row label -> one cell per run."""
    return {
        "parameters": [" -> ".join(f"{count:,}" for count in run.parameters) for run in runs],
        "tokens": [f"{run.tokens:,}" for run in runs],
        "FLOPs, base included": [f"{run.flops:.3e}" for run in runs],
        "growth at, share of FLOPs": [_grown_at(run) for run in runs],
        "final training loss": [_final(run.train.loss) for run in runs],
        "final validation loss": [_final(run.validation.loss) for run in runs],
        "training seconds": [f"{run.seconds:,.0f}" for run in runs],
    }


def _grown_at(run: RunCurves) -> str:
    return ", ".join(f"{growth.flops / run.flops:.1%}" for growth in run.growths) or "-"


def _final(losses: Sequence[float]) -> str:
    return f"{losses[-1]:.4f}" if losses else "-"


def _table(runs: Sequence[RunCurves]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and the rows."""
    rows = [[label, *cells] for label, cells in _rows(runs).items()]
    return ["", *(run.name for run in runs)], rows


def _markdown(runs: Sequence[RunCurves], closing: Sequence[str]) -> str:
    columns, rows = _table(runs)
    cells = [[*map(escape_markdown, row)] for row in rows]
    lines = ["# Growth compared with training from scratch", ""]
    lines += [markdown_table([*map(escape_markdown, columns)], cells), ""]
    lines += [f"- {escape_markdown(line)}" for line in closing]
    return "\n".join([*lines, "", f"![loss]({PLOT})", ""])


def _json(runs: Sequence[RunCurves], comparisons: Sequence[Comparison]) -> str:
    document = {
        "runs": [_summary(run) for run in runs],
        "comparisons": [
            {
                "grown": one.grown.name,
                "scratch": one.scratch.name,
                "compared_by": one.kind,
                **_numbers(one.speedup),
            }
            for one in comparisons
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def _numbers(result: Speedup | None) -> dict[str, float | None]:
    if result is None:
        return {"speedup": None}
    return {**asdict(result), "speedup": result.speedup, "flops_saved": result.saved}


def _summary(run: RunCurves) -> dict[str, Any]:
    return {
        "name": run.name,
        "seed": run.seed,
        "parameters": run.parameters,
        "tokens": run.tokens,
        "flops": run.flops,
        "seconds": run.seconds,
        "final_training_loss": run.train.loss[-1],
        "final_validation_loss": run.validation.loss[-1] if run.validation.loss else None,
        "growths": [asdict(growth) for growth in run.growths],
    }
