"""Detect hung or lost ranks and report which ones are unresponsive.

Each rank runs two threads while its main thread may be blocked in a collective. One sends
heartbeats to rank 0 (`heartbeat.py`) and ends the process when an abort code is set there; the
other requests the abort when the main thread stays in one phase for too long.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch.distributed as dist

from megagrow.errors import HANG_CODE, PeerLost
from megagrow.parallel.launch import Launch
from megagrow.train.fault_tolerance.heartbeat import (
    HeartbeatClient,
    HeartbeatEndpoint,
    HeartbeatServer,
    RankHeartbeat,
    ranks_behind,
    silent_ranks,
)

LONG = 6
"""Factor on the timeout for phases that may take long."""
TICK = 0.5
"""Seconds between two heartbeats."""
SILENT_SECONDS = 2.0
"""Age of a heartbeat from which its rank counts as unresponsive."""
STAY_SECONDS = 1.5
"""Delay before a rank exits after an abort. All ranks read the abort code within it, before a
launcher ends them or the server disappears with rank 0."""


class Watchdog:
    """Watch all ranks; a context manager.

    Args:
        server: the heartbeat server, or a client of it.
        rank: this rank.
        timeout: seconds allowed for a phase; None for no limit.
        endpoint: the server's TCP endpoint, closed at the end.
        end: function that ends the process with an exit code.
        hosts: host name of each rank; empty if all ranks share one.
    """

    def __init__(
        self,
        server: HeartbeatServer | HeartbeatClient,
        rank: int,
        timeout: float | None,
        endpoint: HeartbeatEndpoint | None = None,
        end: Callable[[int], None] = os._exit,
        hosts: Sequence[str] = (),
    ) -> None:
        self._server, self._rank, self._endpoint, self._hosts = server, rank, endpoint, hosts
        self._timeout, self._end = timeout, end
        self._phase, self._phases, self._long = "startup", 0, True
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self._send_heartbeats, self._watch)
        ]

    def __enter__(self) -> "Watchdog":
        self._server.report(self._rank, self._phases, self._phase)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._endpoint is not None:
            self._endpoint.close()

    def beat(self, phase: str, long: bool = False) -> None:
        """Enter the next phase; `long` grants `LONG` times the timeout."""
        self._phase, self._long = phase, long
        self._phases += 1

    def raise_if_peer_lost(self) -> None:
        """Raise PeerLost if a rank is unresponsive; takes a few seconds. Call after a failed
        collective."""
        silent = self._silent()
        if silent:
            is_reporter = self._abort(PeerLost.code)
            time.sleep(STAY_SECONDS)
            raise PeerLost(f"{silent}; aborting all ranks", is_reporter)

    def _send_heartbeats(self) -> None:
        while not self._over.wait(TICK):
            # If rank 0 is gone, the next collective fails with a better message.
            with suppress(OSError):
                code = self._server.report(self._rank, self._phases, self._phase)
                if code and not self._over.wait(STAY_SECONDS):
                    self._end(code)
                    return

    def _watch(self) -> None:
        seen, waited, last = -1, 0.0, time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            # Time for which this process itself was stopped (a suspended job) does not count.
            waited, last = waited + min(now - last, 2 * TICK), now
            if self._phases != seen:
                seen, waited = self._phases, 0.0
            if self._timeout is not None and waited > self._timeout * (LONG if self._long else 1):
                self._end_all(waited)
                return

    def _end_all(self, waited: float) -> None:
        cause = (
            self._silent()
            or ranks_behind(self._heartbeats(), self._hosts)
            or "all ranks respond but are blocked"
        )
        if self._abort(HANG_CODE):
            print(
                f"error: no progress in {self._phase} for {waited:.0f} s; {cause}; aborting all "
                "ranks (guards.hang_timeout)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(STAY_SECONDS)
        self._end(HANG_CODE)

    def _abort(self, code: int) -> bool:
        """Abort all ranks. Returns True if this rank is the first and reports the cause."""
        try:
            return self._server.abort(code)
        except OSError:
            return True  # Without the server each rank reports for itself.

    def _silent(self) -> str:
        """Describe the unresponsive ranks; waits until all heartbeats had time to age."""
        until = time.monotonic() + SILENT_SECONDS + TICK
        while not (silent := self._silent_now()) and time.monotonic() < until:
            time.sleep(TICK)
        return silent

    def _silent_now(self) -> str:
        return silent_ranks(self._heartbeats(), self._hosts, self._rank, SILENT_SECONDS)

    def _heartbeats(self) -> dict[int, RankHeartbeat] | None:
        try:
            return self._server.heartbeats()
        except OSError:
            return None


def start_watchdog(launch: Launch, host: str, timeout: float | None) -> Watchdog:
    """Return this rank's watchdog, not yet entered. Collective.

    Args:
        launch: this rank.
        host: address of rank 0.
        timeout: seconds allowed for a phase; None for no limit.
    """
    if launch.world_size == 1:
        return Watchdog(HeartbeatServer(), launch.rank, timeout)
    hosts = [""] * launch.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    address = ["", ""]
    if launch.rank == 0:
        server = HeartbeatServer()
        endpoint = HeartbeatEndpoint(server)
        address = [str(endpoint.port), endpoint.token]
    dist.broadcast_object_list(address, src=0)
    if launch.rank == 0:
        return Watchdog(server, launch.rank, timeout, endpoint, hosts=hosts)
    client = HeartbeatClient(host, int(address[0]), address[1])
    return Watchdog(client, launch.rank, timeout, hosts=hosts)
