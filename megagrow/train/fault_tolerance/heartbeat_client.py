"""Access of the other ranks to the heartbeat server on rank 0."""

import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from megagrow.train.fault_tolerance.heartbeat import MissingRanks
from megagrow.train.fault_tolerance.heartbeat_endpoint import (
    CLOSING,
    MOST_PHASE,
    HeartbeatAddress,
    challenge_response,
)

ANSWER_SECONDS = 3.0
"""Timeout of a request; a rank 0 that does not answer within it counts as frozen."""
MOST_ANSWER = 65536
"""Bytes of an answer."""


class HeartbeatClient:
    """Access of a rank to the heartbeat server, over one connection. Thread-safe.

    Requests raise OSError without an answer. A broken connection is opened again by the next
    request.

    Args:
        address: address of the server.
        rank: this rank.
        host: host name of this rank.
    """

    def __init__(self, address: HeartbeatAddress, rank: int, host: str) -> None:
        self._address, self._rank, self._host = address, rank, host
        self._lock = threading.Lock()
        self._link: socket.socket | None = None
        self._received = b""
        self._number = 0
        self._over, self._timed_out = False, False
        self._answered: float | None = None
        """Time of the last answer."""
        self._exited: float | None = None
        """Time at which the exit of rank 0 closed the connection."""

    def report(self, rank: int, phases: int, phase: str) -> int:
        """Store this rank's heartbeat, as `HeartbeatServer.report`."""
        return int(self._request("report", phases, phase[:MOST_PHASE]))

    def abort(self, code: int) -> bool:
        """Request all ranks to exit with `code`, as `HeartbeatServer.abort`."""
        return bool(self._request("abort", code))

    def close(self, announce: bool = True) -> None:
        """Close the connection; without `announce` the other ranks treat it as an exit."""
        if announce:
            with suppress(OSError):
                self._request("leave")
        with self._lock:
            self._over = True
            self._disconnect()

    def exited(self, seconds: float) -> str:
        """Describe rank 0 if its process exited unexpectedly, at least `seconds` ago; else "".

        The operating system closes the connections of an exited process. A rank 0 that is
        unreachable or does not answer has not exited.
        """
        with self._lock:
            since = self._exited
        if since is None or time.monotonic() - since < seconds:
            return ""
        return f"{self._rank_zero()} exited or was killed"

    def missing(self, seconds: float) -> MissingRanks:
        """Describe the ranks that may be the cause of a hang, as `HeartbeatServer.missing`."""
        try:
            return MissingRanks(**self._request("missing", seconds))
        except OSError:
            exited, answered = self.exited(0.0), self._answered
        if self._over:
            return MissingRanks(f"{self._rank_zero()} has exited", "", "")
        if answered is None:
            return MissingRanks("", "", "no heartbeat connection with rank 0")
        silence, host = f"{self._rank_zero()} does not answer", self._address.host
        if self._host != host:
            silence += f": frozen or dead, or {host} or {self._host} is off the network"
        if not exited and time.monotonic() - answered < seconds:
            return MissingRanks("", "", silence)
        return MissingRanks(exited or silence, "", "")

    def _rank_zero(self) -> str:
        host = self._address.host
        return "rank 0" if self._host == host else f"rank 0 on {host}"

    def _request(self, *request: Any) -> Any:
        with self._lock:
            if self._over:
                raise OSError("the heartbeat server is closed")
            if self._timed_out and request[0] in ("abort", "missing"):  # an exit must not wait
                raise TimeoutError("rank 0 does not answer")
            link = self._link or self._connect()
            self._number += 1
            try:
                _send(link, [self._number, *request])
                answer = self._answer(link)
            except TimeoutError:  # a late answer is skipped
                self._timed_out = True
                raise
            except (OSError, ValueError) as error:
                if isinstance(error, ConnectionResetError | BrokenPipeError) and self._answered:
                    self._exited = self._exited or time.monotonic()
                self._disconnect()
                raise OSError(f"no answer from rank 0: {error}") from error
            self._answered, self._exited, self._timed_out = time.monotonic(), None, False
            return answer

    def _connect(self) -> socket.socket:
        failure = OSError("rank 0 has no heartbeat server")
        for address in self._address.addresses:
            try:
                link = socket.create_connection((address, self._address.port), ANSWER_SECONDS)
            except OSError as error:
                failure = error
                continue
            try:
                challenge = json.loads(self._read_line(link, _deadline()))
                token = self._address.token
                proof = challenge_response(token, challenge, self._rank, self._host)
                _send(link, [self._rank, self._host, proof])
            except (OSError, ValueError) as error:
                link.close()
                self._received = b""
                failure = OSError(f"no answer from rank 0: {error}")
                continue
            self._link = link
            return link
        raise failure

    def _answer(self, link: socket.socket) -> Any:
        """Return the answer to the last request; skips late answers to earlier ones."""
        deadline = _deadline()
        while True:
            number, answer = json.loads(self._read_line(link, deadline))
            if number == CLOSING:
                self._over = True
                raise OSError("the heartbeat server is closing")
            if number == self._number:
                return answer

    def _read_line(self, link: socket.socket, deadline: float) -> bytes:
        """Return the next line; what was received of a later one is kept."""
        while b"\n" not in self._received:
            link.settimeout(max(0.001, deadline - time.monotonic()))
            data = link.recv(MOST_ANSWER)
            if not data:
                raise ConnectionResetError("the connection was closed")
            self._received += data
            if len(self._received) > 2 * MOST_ANSWER:
                raise ValueError("an answer is too long")
        line, self._received = self._received.split(b"\n", 1)
        return line

    def _disconnect(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        self._received = b""


def _deadline() -> float:
    return time.monotonic() + ANSWER_SECONDS


def _send(link: socket.socket, message: Any) -> None:
    link.settimeout(ANSWER_SECONDS)
    try:
        link.sendall(json.dumps(message).encode() + b"\n")
    except TimeoutError as error:  # a part may have been sent
        raise OSError("rank 0 does not receive") from error
