"""How long the GPU works on a call: nothing of the host's, nothing from the cache.

A spinning kernel holds the GPU until all repeats are queued behind it, so that no gap between
launches is measured; before each repeat the L2 cache is filled by reading other memory (reading,
since what a write leaves in the cache would have to be written back at the expense of the call).
Contenders take turns within a few rounds, so that a card that gets warmer is unfair to none.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Call = Callable[[], object]

ROUNDS, REPEATS = 3, 5
FLUSH_BYTES = 256 * 2**20
"""Several times the L2 cache of any GPU so far."""
SPIN_CYCLES = 10_000_000
LONGEST_SPIN = 0.2
"""Seconds. The queue of a GPU is finite: a call of hundreds of launches fills it, and is then so
long that no gaps between its launches are to be feared."""


class Clock(Protocol):
    """Measures calls."""

    def compare(self, calls: Mapping[str, Call], restore: Call | None = None) -> dict[str, float]:
        """Median seconds of each call, once each has been made for nothing. `restore` is called
        before every call, and not measured: it writes anew what the calls overwrite."""


class CudaClock:
    """Seconds on a GPU, by its own events."""

    def __init__(self, device: torch.device) -> None:
        self._other = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._sink = torch.zeros((), device=device)
        torch.cuda._sleep(SPIN_CYCLES)
        begin, end = _event(), _event()
        begin.record()
        torch.cuda._sleep(SPIN_CYCLES)
        end.record()
        torch.cuda.synchronize()
        self._cycles_per_second = SPIN_CYCLES / (begin.elapsed_time(end) / 1e3)

    def compare(self, calls: Mapping[str, Call], restore: Call | None = None) -> dict[str, float]:
        """See Clock."""
        ready = self._flush if restore is None else lambda: (restore(), self._flush())
        waits = {name: self._host_seconds(call, ready) for name, call in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                seconds[name] += self._round(call, ready, waits[name])
        return {name: statistics.median(found) for name, found in seconds.items()}

    def _host_seconds(self, call: Call, ready: Call) -> float:
        """Seconds in which the host queues a call and what precedes it; also warms it up."""
        ready()
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        ready()
        call()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    def _round(self, call: Call, ready: Call, host_seconds: float) -> list[float]:
        spin = min(2 * REPEATS * host_seconds + 1e-3, LONGEST_SPIN)
        while True:
            events = [(_event(), _event()) for _ in range(REPEATS)]
            torch.cuda._sleep(int(spin * self._cycles_per_second))
            for begin, end in events:
                ready()
                begin.record()
                call()
                end.record()
            queued_in_time = not events[-1][0].query()
            torch.cuda.synchronize()
            if queued_in_time or spin >= LONGEST_SPIN:
                break
            spin = min(4 * spin, LONGEST_SPIN)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def _flush(self) -> None:
        torch.amax(self._other, dim=0, out=self._sink)


class OnceClock:
    """Seconds of one call on the host: they mean nothing, but the calls are made."""

    def compare(self, calls: Mapping[str, Call], restore: Call | None = None) -> dict[str, float]:
        """See Clock."""
        seconds = {}
        for name, call in calls.items():
            if restore is not None:
                restore()
            begin = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - begin
        return seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
