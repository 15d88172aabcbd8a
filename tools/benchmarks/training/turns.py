"""Starts the contestants of run.py and lets them train in turns."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from tools.benchmarks.training.gate import Case

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 240.0
"""Seconds for a contestant to start."""


@dataclass
class Contestant:
    """One contestant's processes, and what they have told so far."""

    case: Case
    processes: list[subprocess.Popen[bytes]]
    connections: list[Connection]
    start_seconds: float = 0.0
    """From the start of its processes to the end of its first step."""
    turns: list[dict[str, float]] = field(default_factory=list)
    """Of each turn after the first: steps, wall seconds of the slowest rank, CPU seconds of all
    ranks together, and seconds of the parts of a step on rank 0 where they are measured."""

    def turn(self) -> dict[str, Any]:
        """Lets it train its next turn; what that took."""
        for connection in self.connections:
            connection.send(None)
        told = [_receive(self, connection) for connection in self.connections]
        return {
            "at": max(message["at"] for message in told),
            "steps": told[0]["turn"]["steps"],
            "wall": max(message["turn"]["wall"] for message in told),
            "cpu": sum(message["turn"]["cpu"] for message in told),
            "parts": told[0]["extra"],
        }


def started(case: Case, stack: ExitStack) -> Contestant:
    """Starts a contestant and lets it train its first step. RuntimeError with what it said if it
    comes to an end instead."""
    Path(case.folder).mkdir(parents=True)
    listener = stack.enter_context(Listener(case.address, family="AF_UNIX"))
    begin = time.time()
    processes = [_process(case, rank, stack) for rank in range(case.ranks)]
    socket_of = listener._listener._socket  # type: ignore[attr-defined]
    by_rank: dict[int, Connection] = {}
    while len(by_rank) < case.ranks:
        socket_of.settimeout(1.0)
        try:
            connection = listener.accept()
        except TimeoutError:
            _check(case, processes, begin)
            continue
        _, rank = connection.recv()
        by_rank[rank] = stack.enter_context(connection)
    contestant = Contestant(case, processes, [by_rank[rank] for rank in sorted(by_rank)])
    contestant.start_seconds = contestant.turn()["at"] - begin
    return contestant


def compete(contestants: list[Contestant]) -> None:
    """All remaining turns, in rounds; every other round goes backwards."""
    rounds = len(contestants[0].case.turns) - 1
    for number in range(rounds):
        for contestant in contestants[:: -1 if number % 2 else 1]:
            contestant.turns.append(contestant.turn())


def finished(contestants: list[Contestant]) -> None:
    """Waits for the processes to come to their end."""
    for contestant in contestants:
        for process in contestant.processes:
            process.wait(PATIENCE)


def _process(case: Case, rank: int, stack: ExitStack) -> subprocess.Popen[bytes]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks}
    environment = os.environ | {key: str(value) for key, value in places.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port(case))}
    environment |= {"OMP_NUM_THREADS": str(case.threads), "DS_ACCELERATOR": "cpu"}
    with Path(case.folder, f"log-{rank}.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(case.as_json())],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    stack.callback(_end, process)
    return process


def _port(case: Case) -> int:
    """One that is free, the same for all ranks of a contestant."""
    path = Path(case.folder, "port")
    if not path.exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            path.write_text(str(free.getsockname()[1]), encoding="ascii")
    return int(path.read_text(encoding="ascii"))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _receive(contestant: Contestant, connection: Connection) -> dict[str, Any]:
    begin = time.time()
    while not connection.poll(1.0):
        _check(contestant.case, contestant.processes, begin)
    try:
        message: dict[str, Any] = connection.recv()
    except EOFError:
        raise _failure(contestant.case) from None
    return message


def _check(case: Case, processes: list[subprocess.Popen[bytes]], begin: float) -> None:
    if any(process.poll() for process in processes):
        raise _failure(case)
    if time.time() - begin > PATIENCE:
        raise RuntimeError(f"{case.contestant}: nothing was heard of it for {PATIENCE:.0f} s")


def _failure(case: Case) -> RuntimeError:
    logs = sorted(Path(case.folder).glob("log-*.txt"))
    last = [log.read_text(encoding="utf-8", errors="replace")[-2000:] for log in logs]
    return RuntimeError("\n".join((f"{case.contestant} failed:", *last)))


def new_folder(stack: ExitStack) -> Path:
    """A temporary folder."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_training_")))
