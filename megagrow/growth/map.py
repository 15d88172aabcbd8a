"""GrowthMap: what every parameter of the target model is made of. Pure data, no communication.

A *gather* makes a target tensor out of one source tensor:

    target[i, j] = rows.scale[i] * cols.scale[j] * source[rows.index[i], cols.index[j]]

Gradients, and with them Adam's exp_avg, follow with scales of their own, and exp_avg_sq with the
squares of those: if weights are lifted as P_out W P_in^+, gradients are as (P_out^+)^T g P_in^T.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Indices = range | np.ndarray
"""Positions along one axis: a `range` where they are consecutive, else int64 (n,)."""


@dataclass(frozen=True)
class Axis:
    """How one axis of the target is made of an axis of the source. All None: the same axis.

    `index` is (n_target,) int64, `scale` and `moment_scale` are (n_target,) fp32.
    """

    index: np.ndarray | None = None
    scale: np.ndarray | None = None
    moment_scale: np.ndarray | None = None

    def source(self, target: range) -> Indices:
        """The source positions of a run of target positions."""
        return target if self.index is None else self.index[target.start : target.stop]


@dataclass(frozen=True)
class Gather:
    """One term of a GrowthMap: the source parameter and how its two axes are read."""

    source: str
    rows: Axis = field(default_factory=Axis)
    cols: Axis = field(default_factory=Axis)


@dataclass(frozen=True)
class GrowthMap:
    """A term for every parameter of the target, and how the optimizer's state follows."""

    terms: dict[str, Gather]
    optimizer_state: Literal["transport", "reset"]
    preserves_function: bool
    """Whether the target computes exactly what the source computed."""
    provenance: tuple[int, ...]
    """For each target layer the source layer that it came from; kept in every checkpoint. Empty
    where nothing grew."""

    def check(self, source: Sequence[str], target: Sequence[str]) -> None:
        """Refuses a map that leaves a target parameter out or reads a source that is not there."""
        for name in target:
            if name not in self.terms:
                raise ValueError(f"the growth map says nothing of {name}")
        for name, term in self.terms.items():
            if name not in target:
                raise ValueError(f"the growth map makes {name}, which the target does not have")
            if term.source not in source:
                raise ValueError(f"{name} is to come from {term.source}, which does not exist")


def identity_map(names: Sequence[str]) -> GrowthMap:
    """The map that changes nothing: with it a growth is a plain reshard."""
    terms = {name: Gather(name) for name in names}
    return GrowthMap(terms, "transport", preserves_function=True, provenance=())
