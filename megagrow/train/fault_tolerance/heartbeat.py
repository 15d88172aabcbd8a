"""Heartbeat server on rank 0: each rank's current phase and a shared abort code.

The other ranks use short TCP connections, because heartbeats are needed while collectives hang.
(torch's own TCPStore prints long stack traces when its host is lost.)
"""

import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ANSWER_SECONDS = 3.0
"""Timeout of a request; a rank 0 that does not answer within it counts as frozen."""


@dataclass(frozen=True)
class RankHeartbeat:
    """Last heartbeat of a rank."""

    phases: int
    """Phases that the rank's main thread has entered. All ranks enter the same phases."""
    phase: str
    age: float
    """Seconds since the heartbeat."""


class HeartbeatServer:
    """Heartbeats of all ranks, kept on rank 0. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: dict[int, tuple[float, int, str]] = {}
        self._code = 0

    def report(self, rank: int, phases: int, phase: str) -> int:
        """Store a rank's heartbeat. Returns the exit code with which all ranks abort, or 0."""
        with self._lock:
            self._reports[rank] = (time.monotonic(), phases, phase)
            return self._code

    def heartbeats(self) -> dict[int, RankHeartbeat]:
        """Return the last heartbeat of each rank."""
        with self._lock:
            now = time.monotonic()
            return {
                rank: RankHeartbeat(phases, phase, now - then)
                for rank, (then, phases, phase) in sorted(self._reports.items())
            }

    def abort(self, code: int) -> bool:
        """Ask all ranks to exit with `code`. Returns True for the first caller only."""
        with self._lock:
            first, self._code = not self._code, self._code or code
            return first


class HeartbeatEndpoint:
    """TCP endpoint of a heartbeat server, on a free port of this host."""

    def __init__(self, server: HeartbeatServer) -> None:
        self.token = secrets.token_hex(8)
        """Secret of this run; requests without it are ignored."""
        token = self.token

        class Handler(socketserver.StreamRequestHandler):
            timeout = ANSWER_SECONDS

            def handle(self) -> None:
                secret, name, *arguments = json.loads(self.rfile.readline(65536))
                if secret == token:
                    self.wfile.write(json.dumps(_answer(server, name, arguments)).encode() + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, request_queue_size = True, 1024

            def handle_error(self, *_: Any) -> None:
                """Ignore clients that disconnect."""

        self._server = Server(("", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class HeartbeatClient:
    """Access of another rank to rank 0's heartbeat server. Raises OSError without an answer."""

    host: str
    port: int
    token: str

    def report(self, rank: int, phases: int, phase: str) -> int:
        """Store a rank's heartbeat, as `HeartbeatServer.report`."""
        return int(self._request("report", rank, phases, phase))

    def heartbeats(self) -> dict[int, RankHeartbeat]:
        """Return the last heartbeat of each rank."""
        answer = self._request("heartbeats")
        return {int(rank): RankHeartbeat(**heartbeat) for rank, heartbeat in answer.items()}

    def abort(self, code: int) -> bool:
        """Ask all ranks to exit with `code`, as `HeartbeatServer.abort`."""
        return bool(self._request("abort", code))

    def _request(self, *request: Any) -> Any:
        with socket.create_connection((self.host, self.port), ANSWER_SECONDS) as connection:
            connection.sendall(json.dumps([self.token, *request]).encode() + b"\n")
            answer = connection.makefile("rb").readline()
        if not answer:
            raise OSError("no answer")
        return json.loads(answer)


def _answer(server: HeartbeatServer, name: str, arguments: list[Any]) -> Any:
    if name == "report":
        return server.report(*arguments)
    if name == "abort":
        return server.abort(*arguments)
    return {rank: asdict(heartbeat) for rank, heartbeat in server.heartbeats().items()}


def silent_ranks(
    heartbeats: dict[int, RankHeartbeat] | None, hosts: Sequence[str], rank: int, seconds: float
) -> str:
    """Describe the ranks without a heartbeat for `seconds`; "" if there are none.

    A host none of whose ranks responds is named instead of its ranks.

    Args:
        heartbeats: None if rank 0 does not answer.
        hosts: host of each rank; empty if all ranks share one.
        rank: the rank that asks.
        seconds: age from which a rank counts as unresponsive.
    """
    several = len(set(hosts)) > 1
    if heartbeats is None:
        silence = f"{_name(0, hosts)} does not answer"
        if several and hosts[rank] != hosts[0]:
            silence += f": frozen or dead, or {hosts[0]} or {hosts[rank]} is off the network"
        return silence
    silent = {rank: heartbeat for rank, heartbeat in heartbeats.items() if heartbeat.age > seconds}
    lost = [host for host in dict.fromkeys(hosts) if several and _ranks(host, hosts) <= {*silent}]
    lost_hosts = [_lost_host(host, hosts, silent) for host in lost]
    rest = {rank: silent[rank] for rank in silent if not lost or hosts[rank] not in lost}
    return "; ".join([*lost_hosts, *_described(rest, hosts, "is unresponsive")])


def ranks_behind(heartbeats: dict[int, RankHeartbeat] | None, hosts: Sequence[str]) -> str:
    """Describe the ranks that have entered fewer phases than others; "" if there are none."""
    known = heartbeats or {}
    furthest = max((heartbeat.phases for heartbeat in known.values()), default=0)
    behind = {rank: known[rank] for rank in known if known[rank].phases < furthest}
    return "; ".join(_described(behind, hosts, "is alive but behind"))


def _described(heartbeats: dict[int, RankHeartbeat], hosts: Sequence[str], state: str) -> list[str]:
    return [
        f"{_name(rank, hosts)} {state} (last heartbeat: {heartbeat.phase})"
        for rank, heartbeat in heartbeats.items()
    ]


def _name(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} on {hosts[rank]}" if len(set(hosts)) > 1 else f"rank {rank}"


def _ranks(host: str, hosts: Sequence[str]) -> set[int]:
    return {rank for rank, name in enumerate(hosts) if name == host}


def _lost_host(host: str, hosts: Sequence[str], silent: dict[int, RankHeartbeat]) -> str:
    ranks = sorted(_ranks(host, hosts))
    last = min((silent[rank] for rank in ranks), key=lambda heartbeat: heartbeat.age)
    names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return (
        f"host {host} ({names}) is unresponsive: down or off the network "
        f"(last heartbeat: {last.phase})"
    )
