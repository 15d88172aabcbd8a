"""Notices that the ranks do not get on, and says which of them is missing.

Two threads of each rank, which go on while the main thread waits in a collective: one gives signs
of life on a board that all ranks can read (board.py), and ends the process if it says so there; the
other says so if the main thread has stayed in one phase for too long.
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
    BoardServer,
    HeartbeatServer,
    RankHeartbeat,
    RemoteBoard,
    ranks_behind,
    silent_ranks,
)

LONG = 6
"""How many times the timeout is granted to what may take long."""

TICK = 0.5
"""Seconds between two signs of life."""
SILENT_SECONDS = 2.0
"""A rank that was not heard of for so long is not alive."""
STAY_SECONDS = 1.5
"""How long a rank stays that knows that all have to end: the others read of it before a launcher,
or the board that leaves with rank 0, can tell them something else."""


class Watchdog:
    """A context in which the ranks are watched; `timeout` in seconds, None for no limit.

    `server` is closed at the end; `end` is how a process is ended; `hosts` has the name of each
    rank's host, or nothing where all are on one.
    """

    def __init__(
        self,
        board: HeartbeatServer | RemoteBoard,
        rank: int,
        timeout: float | None,
        server: BoardServer | None = None,
        end: Callable[[int], None] = os._exit,
        hosts: Sequence[str] = (),
    ) -> None:
        self._board, self._rank, self._server, self._hosts = board, rank, server, hosts
        self._timeout, self._end = timeout, end
        self._phase, self._phases, self._long = "the start", 0, True
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._give_signs, self._watch)
        ]

    def __enter__(self) -> "Watchdog":
        self._board.tell(self._rank, self._phases, self._phase)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._server is not None:
            self._server.close()

    def beat(self, phase: str, long: bool = False) -> None:
        """The main thread has come to the next phase, `long` if it may take its time."""
        self._phase, self._long = phase, long
        self._phases += 1

    def raise_if_peer_lost(self) -> None:
        """Call where something that all ranks do together has failed: PeerLost, in a few seconds,
        if a rank is gone."""
        missing = self._silent()
        if missing:
            is_reporter = self._announce(PeerLost.code)
            time.sleep(STAY_SECONDS)
            raise PeerLost(f"{missing}; all ranks end", is_reporter)

    def _give_signs(self) -> None:
        while not self._over.wait(TICK):
            # Where rank 0 is gone, collectives are going to fail and say more.
            with suppress(OSError):
                code = self._board.tell(self._rank, self._phases, self._phase)
                if code and not self._over.wait(STAY_SECONDS):
                    self._end(code)
                    return

    def _watch(self) -> None:
        seen, waited, last = -1, 0.0, time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            # Time in which this process was stopped itself (a suspended job) is no waiting.
            waited, last = waited + min(now - last, 2 * TICK), now
            if self._phases != seen:
                seen, waited = self._phases, 0.0
            if self._timeout is not None and waited > self._timeout * (LONG if self._long else 1):
                self._end_all(waited)
                return

    def _end_all(self, waited: float) -> None:
        missing = (
            self._silent()
            or ranks_behind(self._signs(), self._hosts)
            or "no rank is missing, all of them wait"
        )
        if self._announce(HANG_CODE):
            print(
                f"error: no progress in {self._phase} for {waited:.0f} s; {missing}; all ranks end "
                "(guards.hang_timeout)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(STAY_SECONDS)
        self._end(HANG_CODE)

    def _announce(self, code: int) -> bool:
        """Tells all ranks to end; whether this one was the first to do so, and says why."""
        try:
            return self._board.announce(code)
        except OSError:
            return True  # Without the board nobody knows of the others.

    def _silent(self) -> str:
        """Who gives no sign of life, in words; it takes some seconds to be sure of nobody."""
        until = time.monotonic() + SILENT_SECONDS + TICK
        while not (missing := self._silent_now()) and time.monotonic() < until:
            time.sleep(TICK)
        return missing

    def _silent_now(self) -> str:
        return silent_ranks(self._signs(), self._hosts, self._rank, SILENT_SECONDS)

    def _signs(self) -> dict[int, RankHeartbeat] | None:
        try:
            return self._board.signs()
        except OSError:
            return None


def start_watchdog(launch: Launch, host: str, timeout: float | None) -> Watchdog:
    """The watchdog of this rank, still to be entered; `host` is where rank 0 runs. All ranks
    together."""
    if launch.world_size == 1:
        return Watchdog(HeartbeatServer(), launch.rank, timeout)
    hosts = [""] * launch.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    told = ["", ""]
    if launch.rank == 0:
        board = HeartbeatServer()
        server = BoardServer(board)
        told = [str(server.port), server.token]
    dist.broadcast_object_list(told, src=0)
    if launch.rank == 0:
        return Watchdog(board, launch.rank, timeout, server, hosts=hosts)
    remote = RemoteBoard(host, int(told[0]), told[1])
    return Watchdog(remote, launch.rank, timeout, hosts=hosts)
