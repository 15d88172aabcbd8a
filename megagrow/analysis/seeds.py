"""Groups of runs that differ only in seed, and their pairing with runs from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megagrow.analysis.curves import RunCurves
from megagrow.analysis.flop_accounting import ACCOUNTS, Account
from megagrow.analysis.speedup_curve import (
    Level,
    LossKind,
    loss_curve,
    loss_kind,
    speedup_curve_levels,
)


@dataclass(frozen=True, slots=True)
class SeedGroup:
    """Runs of one setting with different seeds; at least one run."""

    runs: tuple[RunCurves, ...]

    @property
    def name(self) -> str:
        """Name of the first run, with the number of seeds if there are several."""
        count = len(self.runs)
        return self.runs[0].name if count == 1 else f"{self.runs[0].name} ({count} seeds)"

    @property
    def operator(self) -> str | None:
        """Operator of the last growth; None if it is not recorded or there was no growth."""
        growths = self.runs[0].growths
        return growths[-1].operator if growths else None


@dataclass(frozen=True)
class Matchup:
    """A grown setting and the setting from scratch that ends in the same model."""

    grown: SeedGroup
    scratch: SeedGroup

    @cached_property
    def kind(self) -> LossKind:
        """Loss by which the runs are compared."""
        return loss_kind([*self.grown.runs, *self.scratch.runs])

    @cached_property
    def levels(self) -> dict[Account, list[Level]]:
        """Speedup at each shared loss, by each account of FLOPs known for all runs.

        A list is empty if the runs share no loss.
        """
        levels = {}
        for account in ACCOUNTS:
            scratch = [loss_curve(run, self.kind, account) for run in self.scratch.runs]
            grown = [loss_curve(run, self.kind, account) for run in self.grown.runs]
            scratch_known, grown_known = (
                [curve for curve in curves if curve] for curves in (scratch, grown)
            )
            if len(scratch_known) == len(scratch) and len(grown_known) == len(grown):
                levels[account] = speedup_curve_levels(scratch_known, grown_known)
        return levels

    @property
    def single(self) -> bool:
        """True if each side has a single run, so there is no error bar."""
        return len(self.grown.runs) == len(self.scratch.runs) == 1


def group_runs(runs: Sequence[RunCurves]) -> list[SeedGroup]:
    """Group runs by setting, in order of appearance; a run that repeats a seed starts a new group.

    Settings are compared by config.yaml without seed, name and directory, and by its changes during
    the run. Runs without config.yaml are compared by sizes, tokens and growths.
    """
    groups: list[list[RunCurves]] = []
    for run in runs:
        for group in groups:
            if _same_setting(group[0], run) and run.seed not in {other.seed for other in group}:
                group.append(run)
                break
        else:
            groups.append([run])
    return [SeedGroup(tuple(group)) for group in groups]


def match_groups(groups: Sequence[SeedGroup]) -> list[Matchup]:
    """Pair every grown group with the first group from scratch of the same final size.

    Groups without such a counterpart are left out.
    """
    pairs = [(group, _counterpart(group, groups)) for group in groups if group.runs[0].grown]
    return [Matchup(group, scratch) for group, scratch in pairs if scratch is not None]


def _counterpart(grown: SeedGroup, groups: Sequence[SeedGroup]) -> SeedGroup | None:
    size = grown.runs[0].parameters[-1]
    scratch = (group for group in groups if group.runs[0].from_scratch)
    return next((group for group in scratch if group.runs[0].parameters[-1] == size), None)


def _same_setting(one: RunCurves, other: RunCurves) -> bool:
    if one.setting and other.setting:
        return one.setting.config_key == other.setting.config_key
    return one.setting is other.setting and _shape(one) == _shape(other)


def _shape(run: RunCurves) -> tuple[object, ...]:
    growths = tuple((growth.stage, growth.tokens, growth.operator) for growth in run.growths)
    return run.parameters, run.tokens, growths
