"""Runs that differ by their seed only are told as one, and set against their counterparts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.flop_accounting import ACCOUNTS, Account
from megagrow.analysis.speedup_curve import Level, LossKind, loss_curve, loss_kind, speedup_along
from megagrow.errors import DataError


@dataclass(frozen=True, slots=True)
class SeedGroup:
    """Runs of one setting, each with a seed of its own; at least one."""

    runs: tuple[RunCurves, ...]

    @property
    def name(self) -> str:
        """The first run's, and how many there are."""
        count = len(self.runs)
        return self.runs[0].name if count == 1 else f"{self.runs[0].name} ({count} seeds)"

    @property
    def operator(self) -> str | None:
        """That of the last growth, None where the records do not tell or nothing grew."""
        growths = self.runs[0].growths
        return growths[-1].operator if growths else None


@dataclass(frozen=True)
class Matchup:
    """A setting that grows against the one from scratch that ends in the same model."""

    grown: SeedGroup
    scratch: SeedGroup

    @cached_property
    def kind(self) -> LossKind:
        """The loss they are compared by."""
        return loss_kind([*self.grown.runs, *self.scratch.runs])

    @cached_property
    def levels(self) -> dict[Account, list[Level]]:
        """The speedup along the curve by each account of FLOPs that all the runs know; the list
        is empty where they share no loss."""
        found = {}
        for account in ACCOUNTS:
            scratch = [loss_curve(run, self.kind, account) for run in self.scratch.runs]
            grown = [loss_curve(run, self.kind, account) for run in self.grown.runs]
            slow, fast = ([curve for curve in side if curve] for side in (scratch, grown))
            if len(slow) == len(scratch) and len(fast) == len(grown):
                found[account] = speedup_along(slow, fast)
        return found

    @property
    def single(self) -> bool:
        """Whether there is but one run on each side, and so no error bar."""
        return len(self.grown.runs) == len(self.scratch.runs) == 1


def group_runs(runs: Sequence[RunCurves]) -> list[SeedGroup]:
    """The runs by setting, in order of appearance; one that repeats a seed begins a new group.

    Settings are compared by config.yaml without seed, name and directory; where a run has none,
    by the sizes, tokens and growths.
    """
    groups: list[list[RunCurves]] = []
    for run in runs:
        for group in groups:
            if _alike(group[0], run) and run.seed not in {other.seed for other in group}:
                group.append(run)
                break
        else:
            groups.append([run])
    return [SeedGroup(tuple(group)) for group in groups]


def match_groups(groups: Sequence[SeedGroup]) -> list[Matchup]:
    """Every setting that grows, with the first from scratch of the same final size.

    Raises InputError where one has no counterpart.
    """
    return [Matchup(group, _counterpart(group, groups)) for group in groups if group.runs[0].grown]


def _counterpart(grown: SeedGroup, groups: Sequence[SeedGroup]) -> SeedGroup:
    size = grown.runs[0].parameters[-1]
    for group in groups:
        if group.runs[0].from_scratch and group.runs[0].parameters[-1] == size:
            return group
    raise DataError(
        f"{grown.runs[0].name}: no run from scratch of the same {size:,} parameters is among the "
        "runs; give one to compare it with"
    )


def _alike(one: RunCurves, other: RunCurves) -> bool:
    if one.setting and other.setting:
        return one.setting.alike == other.setting.alike
    return one.setting is other.setting and _shape(one) == _shape(other)


def _shape(run: RunCurves) -> tuple[object, ...]:
    growths = tuple((growth.stage, growth.tokens, growth.operator) for growth in run.growths)
    return run.parameters, run.tokens, growths
