"""Report of a simulated stage: waits of the host, copies, collectives and peaks of memory."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megagrow.simulation.sites import Site

STEP = "step"
"""Section of the second step, the first in which nothing is created."""

RECEIVE = "receive"
"""Operation that takes what another rank sends."""

_OPERATIONS = {
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_": "reduce-scatter",  # each part of a bucket to its rank
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "recv_": RECEIVE,
}


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
    """Collective operation of a process group, or a transfer between two of its ranks."""

    section: str
    kind: str
    """Name in torch's dispatcher, such as `allreduce_`."""
    dtype: torch.dtype
    ranks: int
    stride: int
    """Difference of consecutive ranks of the group: 1 for tensor-parallel groups."""

    @property
    def operation(self) -> str:
        """Collective in the terms of the plan, such as `all-reduce`.

        Reduces to the owners of all partitions are a reduce-scatter.
        """
        return _OPERATIONS.get(self.kind, self.kind)


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
    def peak_phase(self) -> str:
        """Phase of a step with the highest memory use, the first one of several."""
        return max(("forward", "backward", "step"), key=lambda phase: self.peaks[phase].size)

    @property
    def training_peak(self) -> PhasePeak:
        """Highest memory use in the steps."""
        return self.peaks[self.peak_phase]

    @property
    def step_waits(self) -> int:
        """Waits of the host in one step."""
        return sum(self.waits_in(STEP).values())

    def waits_in(self, section: str) -> dict[HostWait, int]:
        """Return the waits of the host in a section, with their numbers."""
        return {wait: count for wait, count in self.waits.items() if wait.section == section}

    def step_copies(self, pinned: bool) -> int:
        """Return the copies from host to device in one step."""
        return self.copies_in(STEP, pinned)

    def copies_in(self, section: str, pinned: bool) -> int:
        """Return the number of copies from host to device in a section."""
        copies = self.copies.items()
        return sum(n for copy, n in copies if (copy.section, copy.pinned) == (section, pinned))

    @property
    def step_traffic(self) -> Counter[tuple[str, int]]:
        """Bytes of the full tensors of one step by operation and size of the group.

        Receives are excluded: they count where they are sent.
        """
        found: Counter[tuple[str, int]] = Counter()
        for key, totals in self.collectives.items():
            if key.section == STEP and key.operation != RECEIVE:
                found[key.operation, key.ranks] += totals.payload
        return found
