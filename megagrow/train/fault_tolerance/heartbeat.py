"""Heartbeats of all ranks on rank 0: current phase, connection state and a shared abort code."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NAMED_RANKS = 8
"""Number of ranks named in a message."""


@dataclass(frozen=True)
class RankHeartbeat:
    """Last heartbeat of a rank."""

    phases: int
    """Phases that the rank's main thread has entered. All ranks enter the same phases."""
    phase: str
    age: float
    """Seconds since the heartbeat."""
    host: str = ""
    exited: float | None = None
    """Seconds since the rank's process has exited; None while it is connected."""


@dataclass(frozen=True)
class MissingRanks:
    """Descriptions of ranks that may be the cause of a hang; "" if there are none."""

    lost: str
    """Ranks that have exited, or else ranks without a recent heartbeat."""
    behind: str
    """Ranks that have entered the fewest phases."""
    unknown: str
    """Ranks that never connected."""


class HeartbeatServer:
    """State of all ranks, kept on rank 0. Thread-safe.

    Args:
        world_size: number of ranks.
        host: host name of rank 0.
    """

    def __init__(self, world_size: int, host: str = "") -> None:
        self._world_size = world_size
        self._lock = threading.Lock()
        self._reports: dict[int, tuple[float, int, str]] = {}
        self._hosts = {0: host}
        self._exits: dict[int, float] = {}
        self._left: set[int] = set()
        self._code = 0

    def connect(self, rank: int, host: str) -> None:
        """Record that a rank is connected, or connected again."""
        with self._lock:
            self._hosts[rank] = host
            self._exits.pop(rank, None)
            self._reports.setdefault(rank, (time.monotonic(), 0, "startup"))

    def disconnect(self, rank: int) -> None:
        """Record that a rank's connection was closed by the exit of its process."""
        with self._lock:
            self._exits.setdefault(rank, time.monotonic())

    def leave(self, rank: int) -> None:
        """Record that a rank is about to exit as planned, or after an error of all ranks."""
        with self._lock:
            self._left.add(rank)

    def report(self, rank: int, phases: int, phase: str) -> int:
        """Store a rank's heartbeat. Returns the exit code with which all ranks abort, or 0."""
        with self._lock:
            self._reports[rank] = (time.monotonic(), phases, phase)
            return self._code

    def abort(self, code: int) -> bool:
        """Request all ranks to exit with `code`. Returns True for the first caller only."""
        with self._lock:
            first, self._code = not self._code, self._code or code
            return first

    def exited(self, seconds: float) -> str:
        """Describe the ranks that exited unexpectedly, at least `seconds` ago; "" if none did."""
        beats = self.heartbeats()
        with self._lock:
            planned = {*self._left}
        unplanned = {rank: beats[rank] for rank in beats if rank not in planned}
        return _exited(unplanned, seconds)

    def missing(self, seconds: float) -> MissingRanks:
        """Describe the ranks that may be the cause of a hang or of a failed collective.

        Args:
            seconds: age from which a rank counts as unresponsive.
        """
        beats = self.heartbeats()
        lost = _exited(beats, 0.0) or silent_ranks(beats, seconds)
        unknown = _names([rank for rank in range(self._world_size) if rank not in beats])
        state = f"no heartbeat connection with {unknown}" if unknown else ""
        return MissingRanks(lost, ranks_behind(beats), state)

    def heartbeats(self) -> dict[int, RankHeartbeat]:
        """Return the last heartbeat of each rank."""
        with self._lock:
            now = time.monotonic()
            return {
                rank: RankHeartbeat(
                    phases,
                    phase,
                    now - then,
                    self._hosts.get(rank, ""),
                    now - self._exits[rank] if rank in self._exits else None,
                )
                for rank, (then, phases, phase) in sorted(self._reports.items())
            }


Heartbeats = Mapping[int, RankHeartbeat]


def silent_ranks(heartbeats: Heartbeats, seconds: float) -> str:
    """Describe the ranks without a heartbeat for `seconds`; "" if there are none.

    A host none of whose ranks responds is named instead of its ranks.
    """
    silent = {rank: beat for rank, beat in heartbeats.items() if beat.age > seconds}
    by_host: dict[str, list[int]] = {}
    for rank, beat in heartbeats.items():
        by_host.setdefault(beat.host, []).append(rank)
    lost = [host for host, ranks in by_host.items() if len(by_host) > 1 and {*ranks} <= {*silent}]
    hosts = [_lost_host(host, {rank: silent[rank] for rank in by_host[host]}) for host in lost]
    rest = {rank: beat for rank, beat in silent.items() if beat.host not in lost}
    return "; ".join([*hosts, *_described(rest, heartbeats, "is unresponsive")])


def ranks_behind(heartbeats: Heartbeats) -> str:
    """Describe the ranks that have entered the fewest phases; "" if all have entered as many.

    Those that wait for them, as the other pipeline ranks do, may be in different phases.
    """
    phases = {beat.phases for beat in heartbeats.values()}
    least = min(phases, default=0) if len(phases) > 1 else -1
    behind = {rank: beat for rank, beat in heartbeats.items() if beat.phases == least}
    return "; ".join(_described(behind, heartbeats, "is alive but behind"))


def _exited(heartbeats: Heartbeats, seconds: float) -> str:
    exited = {
        rank: beat
        for rank, beat in heartbeats.items()
        if beat.exited is not None and beat.exited >= seconds
    }
    return "; ".join(_described(exited, heartbeats, "exited or was killed"))


def _described(some: Heartbeats, heartbeats: Heartbeats, state: str) -> list[str]:
    several = len({beat.host for beat in heartbeats.values()}) > 1
    named = [
        f"rank {rank}{f' on {beat.host}' if several else ''} {state} (last heartbeat: {beat.phase})"
        for rank, beat in [*some.items()][:NAMED_RANKS]
    ]
    rest = len(some) - len(named)
    return [*named, f"and {rest} more"] if rest else named


def _lost_host(host: str, silent: Heartbeats) -> str:
    last = min(silent.values(), key=lambda heartbeat: heartbeat.age)
    return (
        f"host {host} ({_names([*silent])}) is unresponsive: down or off the network "
        f"(last heartbeat: {last.phase})"
    )


def _names(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(map(str, ranks[:NAMED_RANKS]))
    rest = len(ranks) - NAMED_RANKS
    return f"ranks {listed}" + (f" and {rest} more" if rest > 0 else "") if ranks else ""
