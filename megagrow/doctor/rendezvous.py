"""How ranks that may be missing tell each other something: by the launcher's store, in time.

Every wait has an end, and who has not come by then is named.
"""

import json
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from megagrow.errors import PeerLost
from megagrow.parallel.launch import Launch, first_host, open_store

GRACE_SECONDS = 5.0
"""How much longer the others wait for rank 0, which itself waits for all of them."""


class RankMissing(PeerLost):
    """A rank did not come, or is gone; told as a user's mistake, by one rank of each host."""

    code = 2


class Meeting:
    """The ranks of a job, as far as they come. Values are plain JSON."""

    def __init__(self, launch: Launch, seconds: float) -> None:
        """Joins; `seconds` are those of every wait. RankMissing if nobody keeps the store."""
        self.launch = launch
        self._seconds = seconds
        self._present: list[int] = []
        try:
            self.store: Any = open_store(launch, timedelta(seconds=seconds))
        except (RuntimeError, ValueError) as error:
            raise self._missing(
                f"rank 0 at {first_host()} gives no answer within {seconds:.0f} s: is it there, "
                f"and its port open? ({_first_line(error)})"
            ) from error

    def share(self, what: str, value: Any) -> list[Any]:
        """What all ranks say, by rank. RankMissing, on all of them, that names who is."""
        try:
            found = self._everyone(what, value)
        except RuntimeError as error:  # as torch raises when the store does not answer any more
            raise self._missing(
                f"rank 0 at {first_host()} is gone ({what}): {_first_line(error)}"
            ) from error
        self._present = [other for other, said in enumerate(found) if said is not None]
        missing = [other for other, said in enumerate(found) if said is None]
        if missing:
            raise self._missing(
                f"{_ranks(missing)} did not come within {self._seconds:.0f} s ({what}); "
                f"{len(self._present)} of {self.launch.world_size} are there"
            )
        return found

    def _missing(self, text: str) -> RankMissing:
        """Told by the first rank of each host; where that is rank 0's, who may be gone, by the
        first rank that is there."""
        first = min(self._present, default=1)
        return RankMissing(text, self.launch.local_rank == 0 or self.launch.rank == first)

    def _everyone(self, what: str, value: Any) -> list[Any]:
        """By rank what it says, None for who has said nothing in time."""
        rank = self.launch.rank
        self.store.set(f"{what}/{rank}", json.dumps(value))
        if rank == 0:
            found = self._gather(what, self._seconds)
            self.store.set(f"{what}/all", json.dumps(found))
            return found
        if self._wait([f"{what}/all"], self._seconds + GRACE_SECONDS):
            return json.loads(self.store.get(f"{what}/all"))
        return self._gather(what, 0.0)  # rank 0 is among the missing

    def clock_offset(self, rounds: int = 5) -> float:
        """Seconds by which this rank's clock is ahead of rank 0's, and the way of a message, which
        is milliseconds. All ranks call it together."""
        offsets = []
        for index in range(rounds):
            self.share(f"clock {index}", True)
            if self.launch.rank == 0:
                time.sleep(0.02)  # the others are on their way to the wait by then
                self.store.set(f"time {index}", json.dumps(time.time()))
                offsets.append(0.0)
            elif self._wait([f"time {index}"], self._seconds):
                now = time.time()
                offsets.append(now - json.loads(self.store.get(f"time {index}")))
        return min(offsets, key=abs, default=0.0)

    def leave(self) -> None:
        """Rank 0, who may keep the store, leaves as the last of those that were there."""
        rank, others = self.launch.rank, [other for other in self._present if other]
        if rank == 0:
            self._wait([f"left/{other}" for other in others], GRACE_SECONDS)
        elif 0 in self._present:
            with suppress(RuntimeError):  # it is gone already
                self.store.set(f"left/{rank}", "true")

    def _gather(self, what: str, seconds: float) -> list[Any]:
        """By rank what was said in time, None for who has said nothing."""
        keys = [f"{what}/{rank}" for rank in range(self.launch.world_size)]
        self._wait(keys, seconds)
        there = [self.store.check([key]) for key in keys]
        return [
            json.loads(self.store.get(key)) if said else None
            for key, said in zip(keys, there, strict=True)
        ]

    def _wait(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are there in time."""
        if keys:
            try:
                self.store.wait(keys, timedelta(seconds=max(seconds, 0.01)))
            except RuntimeError:  # as torch raises when time is up
                return False
        return True


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}{more}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
