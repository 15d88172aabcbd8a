"""Value exchange between ranks that may be missing, through the launcher's store.

Every wait has a timeout, and the ranks that are missing at its end are named.
"""

import json
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from megagrow.errors import PeerLost
from megagrow.parallel.launch import Launch, first_host
from megagrow.parallel.rendezvous import open_store

GRACE_SECONDS = 5.0
"""Additional time for which other ranks wait for rank 0, which waits for all of them."""


class RankMissing(PeerLost):
    """A rank did not arrive or was lost. Exit code 2; printed by one rank of each host."""

    code = 2


class Rendezvous:
    """Store-based collectives over the ranks of a job. Values are JSON values."""

    def __init__(self, launch: Launch, seconds: float) -> None:
        """Connect to the store; `seconds` is the timeout of every wait.

        Raises RankMissing if no store is reachable.
        """
        self.launch = launch
        self._seconds = seconds
        self._present: list[int] = []
        try:
            self.store: Any = open_store(launch, timedelta(seconds=seconds))
        except (RuntimeError, ValueError) as error:
            raise self._missing(
                f"rank 0 at {first_host()} is unreachable after {seconds:.0f} s; check that it is "
                f"running and that its port is open ({_first_line(error)})"
            ) from error

    def all_gather(self, phase: str, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank; a value must not be None.

        `phase` names the exchange in error messages and must be unique. Raises RankMissing, on all
        present ranks, with the ranks that did not arrive in time.
        """
        try:
            values = self._exchange(phase, value)
        except RuntimeError as error:  # raised by torch if the store no longer responds
            raise self._missing(
                f"rank 0 at {first_host()} was lost ({phase}): {_first_line(error)}"
            ) from error
        self._present = [rank for rank, value in enumerate(values) if value is not None]
        missing = [rank for rank, value in enumerate(values) if value is None]
        if missing:
            raise self._missing(
                f"{_ranks(missing)} did not arrive within {self._seconds:.0f} s ({phase}); "
                f"{len(self._present)} of {self.launch.world_size} ranks are present"
            )
        return values

    def _missing(self, text: str) -> RankMissing:
        """Build the error.

        The first rank of each host reports it, and also the first present rank in case rank 0 is
        missing.
        """
        first = min(self._present, default=1)
        return RankMissing(text, self.launch.local_rank == 0 or self.launch.rank == first)

    def _exchange(self, phase: str, value: Any) -> list[Any]:
        """Return the values by rank, None for ranks that did not arrive in time."""
        rank = self.launch.rank
        self.store.set(f"{phase}/{rank}", json.dumps(value))
        if rank == 0:
            values = self._gather(phase, self._seconds)
            self.store.set(f"{phase}/all", json.dumps(values))
            return values
        if self._wait([f"{phase}/all"], self._seconds + GRACE_SECONDS):
            return json.loads(self.store.get(f"{phase}/all"))
        return self._gather(phase, 0.0)  # rank 0 is missing

    def clock_offset(self, rounds: int = 5) -> float:
        """Return the seconds by which this rank's clock is ahead of rank 0's. Collective.

        The offset includes the latency of a message, which is milliseconds.
        """
        offsets = []
        for index in range(rounds):
            self.all_gather(f"clock {index}", True)
            if self.launch.rank == 0:
                time.sleep(0.02)  # the other ranks reach their wait in this time
                self.store.set(f"time {index}", json.dumps(time.time()))
                offsets.append(0.0)
            elif self._wait([f"time {index}"], self._seconds):
                now = time.time()
                offsets.append(now - json.loads(self.store.get(f"time {index}")))
        return min(offsets, key=abs, default=0.0)

    def close(self) -> None:
        """Disconnect. Rank 0, which may host the store, waits for the other present ranks."""
        rank, others = self.launch.rank, [other for other in self._present if other]
        if rank == 0:
            self._wait([f"left/{other}" for other in others], GRACE_SECONDS)
        elif 0 in self._present:
            with suppress(RuntimeError):  # the store is already closed
                self.store.set(f"left/{rank}", "true")

    def _gather(self, phase: str, seconds: float) -> list[Any]:
        """Return the values set within the timeout by rank, None for missing ones."""
        keys = [f"{phase}/{rank}" for rank in range(self.launch.world_size)]
        self._wait(keys, seconds)
        is_set = [self.store.check([key]) for key in keys]
        return [
            json.loads(self.store.get(key)) if present else None
            for key, present in zip(keys, is_set, strict=True)
        ]

    def _wait(self, keys: list[str], seconds: float) -> bool:
        """Return True if all keys are set within the timeout."""
        if keys:
            try:
                self.store.wait(keys, timedelta(seconds=max(seconds, 0.01)))
            except RuntimeError:  # raised by torch at the timeout
                return False
        return True


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}{more}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
