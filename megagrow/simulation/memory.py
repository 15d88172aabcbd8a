"""Log of the memory of the simulated device: every storage, from its allocation to its release."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megagrow.simulation.device import is_simulated
from megagrow.simulation.sites import Site, current_site

GRANULE = 512
"""Bytes to which CUDA's allocator rounds a request."""


@dataclass(eq=False)
class Allocation:
    """One storage of the device. Times count allocations and releases."""

    size: int
    phase: str
    site: Site
    begin: int
    end: int | None = None
    category: str = ""
    """Category if it is known; else it follows from phase and site."""


@dataclass(frozen=True)
class Peak:
    """Highest use of memory in a phase."""

    size: int = 0
    time: int = 0


class MemoryLog:
    """Storages of the device, the current use and the peak of each phase, in bytes."""

    def __init__(self) -> None:
        self.phase = "build"
        self.current = 0
        self.peaks: dict[str, Peak] = {}
        self._time = 0
        self._live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._all: list[Allocation] = []

    @property
    def highest(self) -> int:
        """Peak over all phases."""
        return max((peak.size for peak in self.peaks.values()), default=0)

    def enter(self, phase: str) -> None:
        """Begin a phase; the memory in use counts as its peak until more is allocated."""
        self.phase = phase
        self._update_peak()

    def track(self, result: Any) -> None:
        """Record the new storages among the results of an operation."""
        if isinstance(result, Tensor):
            if is_simulated(result):
                self._record(result)
        elif isinstance(result, (list, tuple)):
            for each in result:
                self.track(each)

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Set the category of the storages of some tensors."""
        for tensor in tensors:
            entry = self._live.get(tensor.untyped_storage()._cdata)
            if entry is not None:
                entry[1].category = category

    def label_of(self, tensor: Tensor) -> str:
        """Return the category that `label` has set for the storage of a tensor; empty if none."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return "" if entry is None else entry[1].category

    def live(self, time: int | None = None) -> list[Allocation]:
        """Return the storages in use at a time, by default now."""
        if time is None:
            return [allocation for _, allocation in self._live.values()]
        return [a for a in self._all if a.begin <= time and (a.end is None or a.end > time)]

    def _record(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        self._time += 1
        allocation = Allocation(size, self.phase, current_site(), self._time)
        self._all.append(allocation)
        self._live[key] = weakref.ref(storage, lambda _: self._release(key)), allocation
        self.current += size
        self._update_peak()

    def _release(self, key: int) -> None:
        _, allocation = self._live.pop(key)
        self._time += 1
        allocation.end = self._time
        self.current -= allocation.size

    def _update_peak(self) -> None:
        if self.current > self.peaks.get(self.phase, Peak()).size or self.phase not in self.peaks:
            self.peaks[self.phase] = Peak(self.current, self._time)
