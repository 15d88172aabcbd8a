"""Detect hung or lost ranks and report which ones are unresponsive.

Each rank runs two threads while its main thread may be blocked in a collective. One sends
heartbeats to rank 0 (`heartbeat.py`), and ends the process when an abort code is set there or when
a rank has exited. The other requests the abort when the main thread stays in one phase for too
long.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from megagrow.errors import HANG_CODE, InputError, PeerLost, RunError
from megagrow.parallel.launch import Launch, first_host
from megagrow.parallel.process_groups import TIMEOUT, init_process_group
from megagrow.parallel.rendezvous import join_store, wait_for_ranks
from megagrow.train.determinism import deterministic_algorithms
from megagrow.train.fault_tolerance.heartbeat import HeartbeatServer
from megagrow.train.fault_tolerance.heartbeat_client import HeartbeatClient
from megagrow.train.fault_tolerance.heartbeat_endpoint import (
    HeartbeatAddress,
    HeartbeatEndpoint,
    open_endpoint,
)

logger = logging.getLogger(__name__)

JOIN_SECONDS = 1800.0
"""Time for all ranks to join: the hosts of a job may start at different times."""
LONG = 6
"""Factor on the timeout for phases that may take long."""
TICK = 0.5
"""Seconds between two heartbeats."""
SILENT_SECONDS = 2.0
"""Age of a heartbeat from which its rank counts as unresponsive, and time for a rank to open a
broken connection again before it counts as lost."""
STAY_SECONDS = 1.5
"""Delay before a rank exits after an abort. All ranks read the abort code within it, before a
launcher ends them or the server disappears with rank 0."""
UNWIND_SECONDS = 30.0
"""The same for a rank whose main thread raises PeerLost."""
ADDRESS_KEY = "heartbeat server"
PLANNED = (InputError, RunError, KeyboardInterrupt)
"""Exceptions that end all ranks."""


class Watchdog:
    """Watch all ranks; a context manager, to be entered first and left last.

    A RuntimeError that leaves the context becomes PeerLost if a rank is lost. A failure of the
    watchdog itself is logged and does not end the run.

    Args:
        heartbeats: the heartbeat server, or a client of it.
        rank: this rank.
        timeout: seconds allowed for a phase; None for no limit.
        endpoint: the server's endpoint or the client, closed at the end.
        end: function that ends the process with an exit code.
    """

    def __init__(
        self,
        heartbeats: HeartbeatServer | HeartbeatClient,
        rank: int,
        timeout: float | None,
        endpoint: HeartbeatEndpoint | HeartbeatClient | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._heartbeats, self._rank, self._endpoint = heartbeats, rank, endpoint
        self._timeout, self._end = timeout, end
        self._phase, self._phases = "joining the other ranks", 0
        self._factor, self._at_least = LONG, JOIN_SECONDS + 2 * SILENT_SECONDS
        self._over, self._raising = threading.Event(), False
        self._aborting = threading.Lock()
        self._reported = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in (self._send_heartbeats, self._watch)
        ]

    def __enter__(self) -> "Watchdog":
        try:
            self._heartbeats.report(self._rank, self._phases, self._phase)
        except OSError as error:
            logger.warning(
                "no heartbeat connection with rank 0 (%s); training continues, but the loss of a "
                "rank may be detected late",
                error,
            )
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:  # too many threads
            logger.warning("the watchdog cannot start (%s); training continues without it", error)
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        try:
            if isinstance(error, RuntimeError):
                self.raise_if_peer_lost()
            if isinstance(error, PeerLost) and not self._reported:
                self._abort(error.code)
                time.sleep(STAY_SECONDS)
        finally:
            self._over.set()
            for thread in self._threads:
                if thread.is_alive():
                    thread.join()
            if self._endpoint is not None:
                self._endpoint.close(announce=error is None or isinstance(error, PLANNED))

    def beat(self, phase: str, long: bool = False, at_least: float = 0.0) -> None:
        """Enter the next phase.

        Args:
            phase: name of the phase.
            long: allow `LONG` times the timeout.
            at_least: seconds that are always allowed while all ranks send heartbeats.
        """
        self._phase, self._factor, self._at_least = phase, LONG if long else 1, at_least
        self._phases += 1

    def raise_if_peer_lost(self) -> None:
        """Raise PeerLost if a rank is lost; takes a few seconds. Call after a failed collective."""
        lost = self._lost()
        if lost:
            self._raising = True
            is_reporter = self._abort(PeerLost.code)
            time.sleep(STAY_SECONDS)
            raise PeerLost(f"{lost}; aborting all ranks", is_reporter)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            logger.warning(
                "the watchdog failed (%s: %s); training continues without it",
                type(error).__name__,
                error,
            )

    def _send_heartbeats(self) -> None:
        while not self._over.wait(TICK):
            code = self._report()
            if not code and (lost := self._heartbeats.exited(SILENT_SECONDS)):
                code = PeerLost.code
                self._abort(code, f"error: {lost}; aborting all ranks")
            if code and not self._over.wait(UNWIND_SECONDS if self._raising else STAY_SECONDS):
                self._end(code)
                return

    def _report(self) -> int:
        """Send a heartbeat and return the abort code, 0 if there is none or no answer."""
        try:
            return self._heartbeats.report(self._rank, self._phases, self._phase)
        except OSError:
            return 0

    def _watch(self) -> None:
        seen, waited, last = -1, 0.0, time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            # Time for which this process itself was stopped (a suspended job) does not count.
            waited, last = waited + min(now - last, 2 * TICK), now
            if self._phases != seen:
                seen, waited = self._phases, 0.0
            if self._timeout is not None and self._is_over(waited, self._timeout * self._factor):
                self._end_all(waited)
                return

    def _is_over(self, waited: float, limit: float) -> bool:
        """Return True if the phase has taken too long; `_at_least` needs ranks that respond."""
        over = waited > limit
        return over and (waited > self._at_least or bool(self._heartbeats.missing(limit).lost))

    def _end_all(self, waited: float) -> None:
        lost, missing = self._lost(), self._heartbeats.missing(SILENT_SECONDS)
        cause = lost or missing.behind or missing.unknown or "all ranks respond but are blocked"
        self._abort(
            HANG_CODE,
            f"error: no progress in {self._phase} for {waited:.0f} s; {cause}; aborting all ranks "
            "(guards.hang_timeout)",
        )
        time.sleep(STAY_SECONDS)
        self._end(HANG_CODE)

    def _abort(self, code: int, message: str = "") -> bool:
        """Abort all ranks; returns True if this rank is the first and reports the cause.

        It then prints the message, if any.
        """
        with self._aborting:
            try:
                first = self._heartbeats.abort(code) and not self._reported
            except OSError:
                first = not self._reported  # without the server each rank reports for itself
            self._reported = True
            if first and message:
                with suppress(OSError):
                    print(message, file=sys.stderr, flush=True)
            return first

    def _lost(self) -> str:
        """Describe the lost ranks; waits until all heartbeats had time to age."""
        until = time.monotonic() + SILENT_SECONDS + TICK
        while not (lost := self._heartbeats.missing(SILENT_SECONDS).lost):
            if time.monotonic() > until:
                break
            time.sleep(TICK)
        return lost


@contextmanager
def watched_ranks(
    launch: Launch, timeout: float | None, deterministic: bool = False
) -> Iterator[tuple[torch.device, Watchdog]]:
    """Join all ranks; a context with the device of this rank and its running watchdog. Collective.

    The process group must be destroyed within the context. Raises PeerLost if a rank does not join.

    Args:
        launch: this rank.
        timeout: seconds allowed for a phase; None for no limit.
        deterministic: use deterministic algorithms in the context.
    """
    limit = timedelta(seconds=JOIN_SECONDS)
    store = join_store(launch, limit)
    watchdog = start_watchdog(launch, store, timeout)
    with deterministic_algorithms(deterministic), watchdog:
        wait_for_ranks(launch, store, limit)
        watchdog.beat("creating the process group", long=True)
        device = init_process_group(launch, collective_timeout(timeout), store)
        del store  # the group holds it; the store's server must end with the group
        yield device, watchdog


def collective_timeout(timeout: float | None) -> timedelta:
    """Return a limit for collectives that the watchdog's limits do not reach.

    At its own limit torch would end the process with a traceback and another exit code.
    """
    watched = timedelta(seconds=LONG * (timeout or 0.0) + 10 * SILENT_SECONDS)
    return max(TIMEOUT, watched)


def start_watchdog(launch: Launch, store: Any, timeout: float | None) -> Watchdog:
    """Return this rank's watchdog, not yet entered. Waits for rank 0 only.

    Args:
        launch: this rank.
        store: the rendezvous store, through which rank 0 publishes the address of the server.
        timeout: seconds allowed for a phase; None for no limit.

    Raises PeerLost if rank 0 is lost.
    """
    host = socket.gethostname()
    if launch.world_size == 1:
        return Watchdog(HeartbeatServer(1), launch.rank, timeout)
    if launch.rank == 0:
        server = HeartbeatServer(launch.world_size, host)
        endpoint, address = open_endpoint(server, launch, host)
        store.set(ADDRESS_KEY, json.dumps(asdict(address)))
        return Watchdog(server, launch.rank, timeout, endpoint)
    try:
        values = json.loads(store.get(ADDRESS_KEY))
    except RuntimeError as error:  # of torch, at the timeout or without rank 0
        raise PeerLost(
            f"rank 0 at {first_host()} did not start its heartbeat server or was lost",
            is_reporter=launch.local_rank == 0,
        ) from error
    values["addresses"] = tuple(values["addresses"])
    client = HeartbeatClient(HeartbeatAddress(**values), launch.rank, host)
    return Watchdog(client, launch.rank, timeout, client)
