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
from dataclasses import asdict, dataclass
from typing import Any

ANSWER_SECONDS = 3.0
"""An answer has come by then, or rank 0 is frozen."""


@dataclass(frozen=True)
class Sign:
    """What a rank has told of itself."""

    phases: int
    """Phases that its main thread has come to: all ranks come to the same ones."""
    phase: str
    age: float
    """Seconds since it told so."""


class Board:
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

    def signs(self) -> dict[int, Sign]:
        """What each rank was at when it was last heard of."""
        with self._lock:
            now = time.monotonic()
            return {
                rank: Sign(phases, phase, now - then)
                for rank, (then, phases, phase) in sorted(self._told.items())
            }

    def announce(self, code: int) -> bool:
        """Tells all ranks to end with a code; whether nobody had said so before."""
        with self._lock:
            first, self._code = not self._code, self._code or code
            return first


class BoardServer:
    """Serves a board to the other ranks, on a free port of this machine."""

    def __init__(self, board: Board) -> None:
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

    def signs(self) -> dict[int, Sign]:
        """As that of Board."""
        return {int(rank): Sign(**sign) for rank, sign in self._ask("signs").items()}

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


def _answer(board: Board, name: str, arguments: list[Any]) -> Any:
    if name == "tell":
        return board.tell(*arguments)
    if name == "announce":
        return board.announce(*arguments)
    return {rank: asdict(sign) for rank, sign in board.signs().items()}
