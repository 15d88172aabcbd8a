"""Report of a simulated stage: waits of the host, copies, collectives and peaks of memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megagrow.simulation.sites import Site


class HostWait(NamedTuple):
    """Wait of the host for the device."""

    section: str
    """Part of the run, such as `step`."""
    operation: str
    """`item`, `tolist`, `copy to host` or `synchronize`."""
    site: Site


class HostCopy(NamedTuple):
    """Copy from host to device."""

    section: str
    pinned: bool
    """False for pageable host memory, from which a copy blocks the host."""
    site: Site


class CollectiveCall(NamedTuple):
    """Collective operation of a process group."""

    section: str
    kind: str
    """Name in torch's dispatcher, such as `allreduce_`."""
    dtype: torch.dtype
    ranks: int
    stride: int
    """Difference of consecutive ranks of the group: 1 for tensor-parallel groups."""


class CallTotals(NamedTuple):
    """Number of collectives, and bytes of their full tensors."""

    calls: int
    payload: int


@dataclass(frozen=True)
class PhasePeak:
    """Highest memory use in a phase, in bytes."""

    size: int
    categories: Mapping[str, int]


@dataclass(frozen=True)
class StageReport:
    """Events of a stage of one rank, with their numbers."""

    dp: int
    tp: int
    peaks: Mapping[str, PhasePeak]
    """By phase; the phases of a step are `forward`, `backward` and `step`."""
    waits: Mapping[HostWait, int]
    copies: Mapping[HostCopy, int]
    collectives: Mapping[CollectiveCall, CallTotals]

    @property
    def training_peak(self) -> PhasePeak:
        """Highest memory use in the steps."""
        steps = (self.peaks[phase] for phase in ("forward", "backward", "step"))
        return max(steps, key=lambda peak: peak.size)
