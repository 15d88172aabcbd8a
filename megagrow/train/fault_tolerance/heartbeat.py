"""The notice board of the ranks: what each is at, and whether all have to end.

Rank 0 keeps it; the others write on it and read it by short TCP connections, since it is needed
when collectives hang. (torch's own TCPStore prints pages of a trace where its host is gone.)
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
"""An answer has come by then, or rank 0 is frozen."""


@dataclass(frozen=True)
class RankHeartbeat:
    """What a rank has told of itself."""

    phases: int
    """Phases that its main thread has come to: all ranks come to the same ones."""
    phase: str
    age: float
    """Seconds since it told so."""


class HeartbeatServer:
    """The board itself, on rank 0; any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[int, tuple[float, int, str]] = {}
        self._code = 0

    def tell(self, rank: int, phases: int, phase: str) -> int:
        """Notes what a rank is at. Returns the exit code with which all have to end, or 0."""
        with self._lock:
            self._told[rank] = (time.monotonic(), phases, phase)
            return self._code

    def signs(self) -> dict[int, RankHeartbeat]:
        """What each rank was at when it was last heard of."""
        with self._lock:
            now = time.monotonic()
            return {
                rank: RankHeartbeat(phases, phase, now - then)
                for rank, (then, phases, phase) in sorted(self._told.items())
            }

    def announce(self, code: int) -> bool:
        """Tells all ranks to end with a code; whether nobody had said so before."""
        with self._lock:
            first, self._code = not self._code, self._code or code
            return first


class BoardServer:
    """Serves a board to the other ranks, on a free port of this machine."""

    def __init__(self, board: HeartbeatServer) -> None:
        self.token = secrets.token_hex(8)
        """What a caller must know: whoever else finds the port is not heard."""
        token = self.token

        class Handler(socketserver.StreamRequestHandler):
            timeout = ANSWER_SECONDS

            def handle(self) -> None:
                given, name, *arguments = json.loads(self.rfile.readline(65536))
                if given == token:
                    self.wfile.write(json.dumps(_answer(board, name, arguments)).encode() + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, request_queue_size = True, 1024

            def handle_error(self, *_: Any) -> None:
                """A caller that has gone away is none of our concern."""

        self._server = Server(("", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Answers nobody any more."""
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class RemoteBoard:
    """The board of rank 0 as another rank sees it: OSError where it does not answer."""

    host: str
    port: int
    token: str

    def tell(self, rank: int, phases: int, phase: str) -> int:
        """As that of Board."""
        return int(self._ask("tell", rank, phases, phase))

    def signs(self) -> dict[int, RankHeartbeat]:
        """As that of Board."""
        return {int(rank): RankHeartbeat(**sign) for rank, sign in self._ask("signs").items()}

    def announce(self, code: int) -> bool:
        """As that of Board."""
        return bool(self._ask("announce", code))

    def _ask(self, *question: Any) -> Any:
        with socket.create_connection((self.host, self.port), ANSWER_SECONDS) as connection:
            connection.sendall(json.dumps([self.token, *question]).encode() + b"\n")
            answer = connection.makefile("rb").readline()
        if not answer:
            raise OSError("no answer")
        return json.loads(answer)


def _answer(board: HeartbeatServer, name: str, arguments: list[Any]) -> Any:
    if name == "tell":
        return board.tell(*arguments)
    if name == "announce":
        return board.announce(*arguments)
    return {rank: asdict(sign) for rank, sign in board.signs().items()}


def silent_ranks(
    signs: dict[int, RankHeartbeat] | None, hosts: Sequence[str], rank: int, seconds: float
) -> str:
    """Who was not heard of for `seconds`, as `rank` reads the board; "" if nobody is missing.

    `signs` is None where the board gives no answer; `hosts` has the host of each rank. A host of
    which no rank gives a sign is named instead of its ranks.
    """
    several = len(set(hosts)) > 1
    if signs is None:
        dead = f"{_name(0, hosts)} gives no answer: it is frozen or dead"
        away = several and hosts[rank] != hosts[0]
        return f"{dead}, or {hosts[0]} or {hosts[rank]} is off the network" if away else dead
    silent = {rank: sign for rank, sign in signs.items() if sign.age > seconds}
    lost = [host for host in dict.fromkeys(hosts) if several and _ranks(host, hosts) <= {*silent}]
    said = [_lost_host(host, hosts, silent) for host in lost]
    rest = {rank: sign for rank, sign in silent.items() if not lost or hosts[rank] not in lost}
    return "; ".join([*said, *_told(rest, hosts, "gives no sign of life: it is frozen or dead")])


def ranks_behind(signs: dict[int, RankHeartbeat] | None, hosts: Sequence[str]) -> str:
    """Who has come to fewer phases than the others; "" if nobody is behind."""
    known = signs or {}
    furthest = max((sign.phases for sign in known.values()), default=0)
    behind = {rank: sign for rank, sign in known.items() if sign.phases < furthest}
    return "; ".join(_told(behind, hosts, "is alive, but stays behind"))


def _told(signs: dict[int, RankHeartbeat], hosts: Sequence[str], why: str) -> list[str]:
    return [f"{_name(r, hosts)} {why}, last heard of in {s.phase}" for r, s in signs.items()]


def _name(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} on {hosts[rank]}" if len(set(hosts)) > 1 else f"rank {rank}"


def _ranks(host: str, hosts: Sequence[str]) -> set[int]:
    return {rank for rank, there in enumerate(hosts) if there == host}


def _lost_host(host: str, hosts: Sequence[str], silent: dict[int, RankHeartbeat]) -> str:
    ranks = sorted(_ranks(host, hosts))
    last = min((silent[rank] for rank in ranks), key=lambda sign: sign.age)
    which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return (
        f"host {host} ({which}) gives no sign of life: it is down or off the network, last heard "
        f"of in {last.phase}"
    )
