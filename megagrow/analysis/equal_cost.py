"""Comparison of the losses of runs at equal FLOPs, tokens and training time."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from megagrow.analysis.curves import RunCurves, Series
from megagrow.analysis.seeds import SeedGroup
from megagrow.analysis.speedup_curve import LossKind, loss_kind, loss_series

CostAxis = Literal["flops", "tokens", "seconds"]
COST_AXES: dict[CostAxis, str] = {
    "flops": "FLOPs",
    "tokens": "tokens",
    "seconds": "training time",
}


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """Losses of the runs of one setting at one cost, in nats per token."""

    name: str
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return fmean(self.losses)


@dataclass(frozen=True, slots=True)
class EqualCost:
    """Losses of several settings at the largest cost that all of their runs reach."""

    axis: CostAxis
    at: float
    """FLOPs (6 N per token), tokens or seconds."""
    groups: tuple[GroupLoss, ...]
    """At least two, lowest mean first."""

    @property
    def best(self) -> GroupLoss:
        """Setting with the lowest mean loss."""
        return self.groups[0]

    @property
    def second(self) -> GroupLoss:
        """Setting with the second lowest mean loss."""
        return self.groups[1]

    @property
    def overlaps(self) -> bool:
        """True if the ranges over seeds of the best two settings overlap."""
        return max(self.best.losses) >= min(self.second.losses)


def comparable(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Return the groups whose runs contain the full training cost of their model."""
    return [group for group in groups if all(run.has_full_cost for run in group.runs)]


def equal_costs(groups: Sequence[SeedGroup]) -> list[EqualCost]:
    """Compare settings at equal cost, on every axis on which all of their runs share a cost.

    The loss is that of `compared_kind`, interpolated linearly between measurements.
    """
    groups = comparable(groups)
    if len(groups) < 2:
        return []
    kind = compared_kind(groups)
    compared = (_at_equal_cost(groups, kind, axis) for axis in COST_AXES)
    return [equal for equal in compared if equal is not None]


def compared_kind(groups: Sequence[SeedGroup]) -> LossKind:
    """Return the loss by which all runs of the groups are compared."""
    return loss_kind([run for group in groups for run in group.runs])


def _at_equal_cost(groups: Sequence[SeedGroup], kind: LossKind, axis: CostAxis) -> EqualCost | None:
    def series(run: RunCurves) -> Series:
        return loss_series(run, kind)

    at = min(getattr(series(run), axis)[-1] for group in groups for run in group.runs)
    rows = []
    for group in groups:
        losses = [loss_at(series(run), axis, at) for run in group.runs]
        reached = tuple(loss for loss in losses if loss is not None)
        if len(reached) < len(losses):
            return None
        rows.append(GroupLoss(group.name, reached))
    return EqualCost(axis, at, tuple(sorted(rows, key=lambda row: row.mean)))


def loss_at(series: Series, axis: CostAxis, at: float) -> float | None:
    """Return the loss at a cost, None before the first measurement."""
    costs, losses = getattr(series, axis), series.loss
    index = bisect_right(costs, at)
    if index == 0:
        return None
    if index == len(costs):
        return losses[-1]
    share = (at - costs[index - 1]) / (costs[index] - costs[index - 1])
    return losses[index - 1] + share * (losses[index] - losses[index - 1])
