"""Grown runs against runs from scratch: a table, the measured speedup, a plot, files of both."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megagrow.analysis.curves import RunCurves, load_run
from megagrow.analysis.plots import plot_runs
from megagrow.analysis.seeds import group_runs, match_groups
from megagrow.analysis.speedup import Speedup, measure_speedup
from megagrow.analysis.speedup_curve import LossKind, loss_kind
from megagrow.common.tables import markdown_table, print_lines, print_table
from megagrow.errors import DataError

PLOT = "loss_vs_flops.png"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A grown run and a run from scratch that end in the same model."""

    grown: RunCurves
    scratch: RunCurves
    kind: LossKind
    speedup: Speedup | None
    """None where the curves do not tell (`measure_speedup`)."""


def load_runs(directories: Sequence[Path]) -> list[RunCurves]:
    """The finished runs in these directories, those of one name told apart by their directory.

    Raises InputError where one is missing or unfinished.
    """
    return _distinct(directories, [load_run(directory) for directory in directories])


def compare_runs(curves: Sequence[RunCurves], output: Path, console: Console) -> list[Comparison]:
    """Compares every run that grew with one from scratch that ends in the same model.

    The runs stand in any order; all of them are tabled and plotted. A run without a growth is one
    from scratch, but one that began with a model or tunes one is compared with none. Prints table
    and closing lines, and writes comparison.json, comparison.md and loss_vs_flops.png into
    `output`. Raises InputError where none grew, or one has no counterpart.
    """
    comparisons = [_against(run, curves) for run in curves if run.grown]
    if not comparisons:
        raise DataError("none of the runs grew from initial weights: give at least one")
    output.mkdir(parents=True, exist_ok=True)
    closing = closing_lines(curves, comparisons)
    plot_runs(curves, output / PLOT, comparisons[0].speedup)
    (output / "comparison.md").write_text(_markdown(curves, closing), encoding="utf-8")
    (output / "comparison.json").write_text(_json(curves, comparisons), encoding="utf-8")
    print_table(console, *_table(curves))
    print_lines(console, [*closing, f"Plot: {output / PLOT}"])
    return comparisons


def compare_pair(grown: RunCurves, scratch: RunCurves) -> Comparison:
    """Compares two runs by validation loss, or by the smoothed training loss if one has none."""
    kind = loss_kind([grown, scratch])
    series = [run.validation if kind == "validation" else run.train for run in (scratch, grown)]
    return Comparison(grown, scratch, kind, measure_speedup(*(one.curve() for one in series)))


def closing_lines(curves: Sequence[RunCurves], comparisons: Sequence[Comparison]) -> list[str]:
    """What the comparisons of these runs have found, in words."""
    lines = [line for comparison in comparisons for line in _findings(comparison)]
    if all(matchup.single for matchup in match_groups(group_runs(curves))):
        lines.append("Each run was done once, with one seed: there is no error bar.")
    return lines


def _findings(comparison: Comparison) -> list[str]:
    grown, scratch, found = comparison.grown, comparison.scratch, comparison.speedup
    if found is None:
        return [
            f"{grown.name}, {scratch.name}: they share no {comparison.kind} loss that both pass, "
            "so there is no speedup to tell."
        ]
    verdict = "faster" if found.speedup > 0 else "not faster"
    saved = f"{abs(found.saved):.1%} {'fewer' if found.saved >= 0 else 'more'} FLOPs"
    return [
        f"Final {comparison.kind} loss: {grown.name} {found.final_grown:.4f} after "
        f"{grown.flops:.3e} FLOPs, {scratch.name} {found.final_scratch:.4f} after "
        f"{scratch.flops:.3e} FLOPs.",
        f"At equal loss {found.loss:.4f}: {grown.name} needed {found.flops_grown:.3e} FLOPs, its "
        f"base included, {scratch.name} {found.flops_scratch:.3e}.",
        f"Speedup sp = {found.speedup:+.1%} ({saved}): growth was {verdict} here.",
    ]


def _against(grown: RunCurves, runs: Sequence[RunCurves]) -> Comparison:
    size = grown.parameters[-1]
    fitting = [run for run in runs if run.from_scratch and run.parameters[-1] == size]
    if fitting:
        return compare_pair(grown, min(fitting, key=lambda run: run.seed != grown.seed))
    raise DataError(
        f"{grown.name}: no run from scratch of the same {size:,} parameters is among the runs; "
        "give one to compare it with"
    )


def _distinct(paths: Sequence[Path], runs: Sequence[RunCurves]) -> list[RunCurves]:
    """The runs, those of the same name told apart by their directories."""
    uses = Counter(run.name for run in runs)
    return [
        run if uses[run.name] == 1 else replace(run, name=f"{run.name} ({path})")
        for path, run in zip(paths, runs, strict=True)
    ]


def _rows(runs: Sequence[RunCurves]) -> dict[str, list[str]]:
    """The table: what is told -> one cell per run."""
    return {
        "parameters": [" -> ".join(f"{count:,}" for count in run.parameters) for run in runs],
        "tokens": [f"{run.tokens:,}" for run in runs],
        "FLOPs, base included": [f"{run.flops:.3e}" for run in runs],
        "grown at, of its FLOPs": [_grown_at(run) for run in runs],
        "final training loss": [_final(run.train.loss) for run in runs],
        "final validation loss": [_final(run.validation.loss) for run in runs],
        "training seconds": [f"{run.seconds:,.0f}" for run in runs],
    }


def _grown_at(run: RunCurves) -> str:
    return ", ".join(f"{growth.flops / run.flops:.1%}" for growth in run.growths) or "-"


def _final(losses: Sequence[float]) -> str:
    return f"{losses[-1]:.4f}" if losses else "-"


def _table(runs: Sequence[RunCurves]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows."""
    rows = [[name, *cells] for name, cells in _rows(runs).items()]
    return ["", *(run.name for run in runs)], rows


def _markdown(runs: Sequence[RunCurves], closing: Sequence[str]) -> str:
    lines = ["# Grown against from scratch", "", markdown_table(*_table(runs))]
    return "\n".join([*lines, "", *(f"- {line}" for line in closing), "", f"![loss]({PLOT})", ""])


def _json(runs: Sequence[RunCurves], comparisons: Sequence[Comparison]) -> str:
    whole = {
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
    return json.dumps(whole, indent=2) + "\n"


def _numbers(found: Speedup | None) -> dict[str, float | None]:
    if found is None:
        return {"speedup": None}
    return {**asdict(found), "speedup": found.speedup, "flops_saved": found.saved}


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
