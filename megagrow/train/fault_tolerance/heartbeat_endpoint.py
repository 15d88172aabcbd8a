"""TCP endpoint of the heartbeat server on rank 0.

Each of the other ranks keeps one connection (`heartbeat_client.py`). Heartbeats are needed while
collectives hang, so they use no process group; torch's TCPStore prints stack traces when its host
is lost. The end of a connection also reveals the exit of a process, at once.

A new connection receives a random challenge and must return its HMAC under the job's token before
anything else. Messages are lines of JSON: `[number, request, *arguments]` and `[number, answer]`.
"""

import hashlib
import hmac
import json
import logging
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from megagrow.errors import HANG_CODE, PeerLost
from megagrow.parallel.launch import Launch, first_host, listen_address
from megagrow.train.fault_tolerance.heartbeat import HeartbeatServer

logger = logging.getLogger(__name__)

AUTHENTICATION_SECONDS = 2.0
"""Time for a new connection to answer the challenge."""
PAUSE_SECONDS = 1.0
"""Time without new connections after one could not be accepted."""
LEAVE_SECONDS = 2.0
"""Time for the other ranks to leave before the server closes their connections."""
POLL_SECONDS = 0.1
BATCH_SECONDS = 0.02
"""Pause between two turns, so that one turn serves several ranks."""
SPARE_CONNECTIONS = 64
"""Connections in addition to one per rank."""
MOST_ACCEPTED = SPARE_CONNECTIONS // 2
"""New connections in a turn. A rank answers the challenge before its connection is replaced."""
BACKLOG = 1024
CLOSING = -1
"""Number of the last message that the server sends on a connection."""
MOST_REQUEST = 4096
"""Bytes of a request."""
MOST_PHASE = 200
"""Characters of a phase."""


@dataclass(frozen=True)
class HeartbeatAddress:
    """Address of the heartbeat server, published in the job's rendezvous store."""

    addresses: tuple[str, ...]
    """IP addresses and host names to try in order; empty if there is no server."""
    port: int
    token: str
    """Secret of the job."""
    host: str
    """Host name of rank 0."""


class _Connection:
    """One connection of the server; `rank` is None until it is authenticated."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.challenge = secrets.token_hex(16)
        self.since = time.monotonic()
        self.rank: int | None = None
        self.received = b""


class HeartbeatEndpoint:
    """TCP endpoint of a heartbeat server on a free port, served by one thread.

    At most `world_size` + `SPARE_CONNECTIONS` connections are open; a new one replaces the oldest
    that is not authenticated. An error of a connection closes that connection only; an error of
    the endpoint is logged once. Neither ends the run.

    Raises OSError if no port is available at `address`, an IP address of this host.
    """

    def __init__(self, server: HeartbeatServer, world_size: int, address: str) -> None:
        self._server, self._world_size = server, world_size
        self.token = secrets.token_hex(32)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=BACKLOG)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._paused_until: float | None = None
        self._pending: dict[socket.socket, _Connection] = {}
        self._ranks: dict[int, _Connection] = {}
        self._closing, self._warned = threading.Event(), False
        self._thread = threading.Thread(target=self._serve, name="heartbeats", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._pending) + len(self._ranks)

    def close(self, announce: bool = True) -> None:
        """Close all connections.

        With `announce`, the other ranks may leave first. Otherwise they treat the end of the
        connections as the exit of rank 0.
        """
        if announce:
            deadline = time.monotonic() + LEAVE_SECONDS
            for connection in [*self._ranks.values()]:
                self._send(connection, [CLOSING, None])
            while self._ranks and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 10)
        self._closing.set()
        self._thread.join()
        for connection in [*self._ranks.values(), *self._pending.values()]:
            connection.link.close()
        self._selector.close()
        self._listener.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                self._turn()
                self._closing.wait(BATCH_SECONDS)
            except Exception as error:  # must end neither the run nor the heartbeats
                self._warn(error)
                self._closing.wait(POLL_SECONDS)

    def _turn(self) -> None:
        """Serve all connections that are ready."""
        for key, _ in self._selector.select(POLL_SECONDS):
            if key.data is None:
                all(self._accept() for _ in range(MOST_ACCEPTED))
            elif key.data.link.fileno() >= 0:  # not dropped in this turn
                self._read(key.data)
        now = time.monotonic()
        while self._pending:
            oldest = next(iter(self._pending.values()))
            if now - oldest.since <= AUTHENTICATION_SECONDS:
                break
            self._drop(oldest)
        if self._paused_until is not None and now > self._paused_until:
            self._paused_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> bool:
        """Accept a connection; returns False if there is none."""
        try:
            link, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:  # no file descriptor is left; open connections are unaffected
            self._warn(error)
            self._selector.unregister(self._listener)
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            return False
        link.setblocking(False)
        if self.connections >= self._world_size + SPARE_CONNECTIONS:
            self._drop(next(iter(self._pending.values())))
        connection = _Connection(link)
        self._pending[link] = connection
        self._selector.register(link, selectors.EVENT_READ, connection)
        self._send(connection, connection.challenge)
        return True

    def _read(self, connection: _Connection) -> None:
        """Handle the received lines; an invalid one ends the connection."""
        try:
            data = connection.link.recv(MOST_REQUEST)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        except OSError:  # the network failed, not the process
            self._drop(connection)
            return
        connection.received += data
        try:
            while b"\n" in connection.received:
                line, connection.received = connection.received.split(b"\n", 1)
                self._handle(connection, line)
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            self._drop(connection)
            return
        if not data and connection.rank is not None:
            self._server.disconnect(connection.rank)
        if not data or len(connection.received) > MOST_REQUEST:
            self._drop(connection)

    def _handle(self, connection: _Connection, line: bytes) -> None:
        if connection.rank is None:
            self._authenticate(connection, line)
        else:
            number, request, *arguments = json.loads(line)
            answer = self._answer(connection.rank, request, arguments)
            self._send(connection, [int(number), answer])

    def _authenticate(self, connection: _Connection, line: bytes) -> None:
        """Accept the connection of a rank that knows the token; raises ValueError otherwise."""
        rank, host, proof = json.loads(line)
        expected = challenge_response(self.token, connection.challenge, rank, host)
        if not hmac.compare_digest(str(proof).encode(), expected.encode()):
            raise ValueError("wrong token")
        if type(rank) is not int or not 0 < rank < self._world_size:
            raise ValueError("wrong rank")
        if rank in self._ranks:
            self._drop(self._ranks[rank])
        del self._pending[connection.link]
        connection.rank = rank
        self._ranks[rank] = connection
        self._server.connect(rank, str(host))

    def _answer(self, rank: int, request: str, arguments: list[Any]) -> Any:
        if request == "report":
            phases, phase = arguments
            return self._server.report(rank, int(phases), str(phase)[:MOST_PHASE])
        if request == "abort":
            if arguments[0] not in (HANG_CODE, PeerLost.code):
                raise ValueError("not an exit code of an abort")
            return self._server.abort(int(arguments[0]))
        if request == "leave":
            return self._server.leave(rank)
        if request == "missing":
            return asdict(self._server.missing(float(arguments[0])))
        raise ValueError("not a request")

    def _send(self, connection: _Connection, message: Any) -> None:
        """Send a short line; it fits into the buffer, because a client awaits each answer."""
        with suppress(OSError):  # the next read reports the error
            connection.link.send(json.dumps(message).encode() + b"\n")

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.link)
        self._pending.pop(connection.link, None)
        connection.link.close()
        if connection.rank is not None and self._ranks.get(connection.rank) is connection:
            del self._ranks[connection.rank]

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the heartbeat server failed on a connection (%s: %s); training continues",
                type(error).__name__,
                error,
            )


def challenge_response(token: str, challenge: Any, rank: Any, host: Any) -> str:
    """Return the proof that a rank knows the token."""
    text = json.dumps([challenge, rank, host]).encode()
    return hmac.new(token.encode(), text, hashlib.sha256).hexdigest()


def open_endpoint(
    server: HeartbeatServer, launch: Launch, host: str
) -> tuple[HeartbeatEndpoint | None, HeartbeatAddress]:
    """Open the endpoint of rank 0 on a host; logs a warning and returns None if it cannot."""
    own = listen_address(launch)
    try:
        endpoint = HeartbeatEndpoint(server, launch.world_size, own)
    except (OSError, RuntimeError) as error:  # no port or no thread
        logger.warning(
            "the heartbeat server cannot listen at %s (%s); training continues, but the loss of a "
            "rank may be detected late",
            own,
            error,
        )
        return None, HeartbeatAddress((), 0, "", host)
    addresses = tuple(dict.fromkeys(name for name in (own, first_host()) if name))
    return endpoint, HeartbeatAddress(addresses, endpoint.port, endpoint.token, host)
