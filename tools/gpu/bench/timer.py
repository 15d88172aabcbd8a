"""GPU timers that exclude host time and start with a cold cache.

A spinning kernel holds the GPU until all repeats are queued behind it, so that gaps between
launches are not measured. Before each repeat, the L2 cache is filled by reading other memory.
(Written lines would have to be flushed during the call.) Implementations alternate over a few
rounds, so that thermal drift affects all of them equally.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Call = Callable[[], object]

ROUNDS, REPEATS = 3, 5
FLUSH_BYTES = 256 * 2**20
"""Bytes read to evict the L2 cache: several times the L2 cache of current GPUs."""
SPIN_CYCLES = 10_000_000
LONGEST_SPIN = 0.2
"""Longest spin in seconds. A GPU's queue is finite: a call of hundreds of launches fills it, and is
then so long that gaps between its launches are negligible.
"""


class Timer(Protocol):
    """Timer interface."""

    def compare(self, calls: Mapping[str, Call], restore: Call | None = None) -> dict[str, float]:
        """Return the median seconds of each call, after one untimed call each.

        `restore` runs before every call, untimed. It restores inputs that the calls overwrite.
        """


class CudaTimer:
    """Timer that uses CUDA events."""

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
        """Implement `Timer.compare` with CUDA events."""
        prepare = self._flush if restore is None else lambda: (restore(), self._flush())
        host_seconds = {name: self._host_seconds(call, prepare) for name, call in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                seconds[name] += self._round(call, prepare, host_seconds[name])
        return {name: statistics.median(samples) for name, samples in seconds.items()}

    def _host_seconds(self, call: Call, prepare: Call) -> float:
        """Return the host seconds to queue a call and its preparation. Also warms up the call."""
        prepare()
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        prepare()
        call()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    def _round(self, call: Call, prepare: Call, host_seconds: float) -> list[float]:
        spin = min(2 * REPEATS * host_seconds + 1e-3, LONGEST_SPIN)
        while True:
            events = [(_event(), _event()) for _ in range(REPEATS)]
            torch.cuda._sleep(int(spin * self._cycles_per_second))
            for begin, end in events:
                prepare()
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


class SmokeTimer:
    """Timer that makes each call once on the host; its seconds are meaningless."""

    def compare(self, calls: Mapping[str, Call], restore: Call | None = None) -> dict[str, float]:
        """Implement `Timer.compare` with host time."""
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
