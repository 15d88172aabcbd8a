"""Content of a report on runs: groups, comparisons, conclusion and tables."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megagrow.analysis.curves import RunCurves, load_any_curves
from megagrow.analysis.equal_cost import EqualCost, compared_kind, equal_costs
from megagrow.analysis.mixing import MixingTimes, mixing_times
from megagrow.analysis.paper import compare_with_paper, read_paper
from megagrow.analysis.report.conclusion import conclude, missing
from megagrow.analysis.report.tables import (
    Table,
    equal_cost_table,
    growth_table,
    mixing_table,
    origin_table,
    run_table,
    score_table,
    speedup_table,
    validation_table,
)
from megagrow.analysis.seeds import Matchup, SeedGroup, group_runs, match_groups
from megagrow.analysis.speedup import Speedup, measure_speedup
from megagrow.analysis.speedup_curve import loss_series
from megagrow.train.reporting.writers import Record


@dataclass(frozen=True)
class Report:
    """Runs of a report, at least one, and everything derived from them."""

    runs: Sequence[RunCurves]
    against_paper: bool = False

    @cached_property
    def groups(self) -> list[SeedGroup]:
        """Runs grouped by setting."""
        return group_runs(self.runs)

    @cached_property
    def matchups(self) -> list[Matchup]:
        """Grown settings with their counterparts from scratch."""
        return match_groups(self.groups)

    @cached_property
    def equal_costs(self) -> list[EqualCost]:
        """Losses of all settings at equal cost."""
        return equal_costs(self.groups)

    @cached_property
    def conclusion(self) -> list[str]:
        """Result in sentences."""
        return conclude(self.groups, self.matchups, self.equal_costs)

    @cached_property
    def missing(self) -> list[str]:
        """Limits of the result, one sentence each."""
        return missing(self.groups, self.matchups)

    @cached_property
    def mixing_times(self) -> list[MixingTimes]:
        """Mixing times of the matchups in which they are defined."""
        return [mixing for mixing in map(mixing_times, self.matchups) if mixing is not None]

    @property
    def title(self) -> str:
        """Names of one or two runs, or the number of runs."""
        names = [run.name for run in self.runs]
        return " and ".join(names) if len(names) < 3 else f"Comparison of {len(names)} runs"

    @property
    def speedup(self) -> Speedup | None:
        """Speedup of the first pair of runs, at the worse of their final losses."""
        if not self.matchups:
            return None
        first = self.matchups[0]
        pair = [
            loss_series(group.runs[0], first.kind).curve() for group in (first.scratch, first.grown)
        ]
        return measure_speedup(*pair)

    @cached_property
    def tables(self) -> list[Table]:
        """Tables that have rows, in the order of the page."""
        tables = [run_table(self.runs)]
        if self.equal_costs:
            tables.append(equal_cost_table(self.equal_costs, compared_kind(self.groups)))
        if self.matchups:
            tables += [speedup_table(self.matchups), mixing_table(self.mixing_times)]
        if self.against_paper:
            tables.append(compare_with_paper(self.matchups, read_paper()))
        several = (validation_table, growth_table, score_table, origin_table)
        tables += [table(self.runs) for table in several]
        return [table for table in tables if table.rows]


def make_report(
    runs: Iterable[tuple[Path, Sequence[Record]]], against_paper: bool = False
) -> Report:
    """Return the report on runs, finished or not, from their directories and records.

    Raises InputError if a run is damaged or has no training loss.
    """
    curves = [load_any_curves(directory, records) for directory, records in runs]
    return Report(_with_unique_names(curves), against_paper)


def _with_unique_names(runs: Sequence[RunCurves]) -> list[RunCurves]:
    """Append the directory to the names of runs of the same name."""
    counts = Counter(run.name for run in runs)
    return [
        run if counts[run.name] == 1 else replace(run, name=f"{run.name} ({run.directory})")
        for run in runs
    ]
