"""Start the configurations of run.py and let them train in turn."""

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

from tools.benchmarks.training.gate import TrainingCase

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 240.0
"""Seconds to wait for a start, a turn or an exit."""


@dataclass
class Configuration:
    """Processes of one configuration and their measurements."""

    case: TrainingCase
    processes: list[subprocess.Popen[bytes]]
    connections: list[Connection]
    start_seconds: float = 0.0
    """Seconds from the start of the processes to the end of the first step."""
    turns: list[dict[str, float]] = field(default_factory=list)
    """Per turn after the first: steps, wall seconds of the slowest rank, total CPU seconds of all
    ranks, and seconds of the parts of a step on rank 0 if they are measured."""

    def turn(self) -> dict[str, Any]:
        """Train the next turn and return its measurements."""
        for connection in self.connections:
            connection.send(None)
        messages = [_receive(self, connection) for connection in self.connections]
        return {
            "at": max(message["at"] for message in messages),
            "steps": messages[0]["turn"]["steps"],
            "wall": max(message["turn"]["wall"] for message in messages),
            "cpu": sum(message["turn"]["cpu"] for message in messages),
            "parts": messages[0]["extra"],
        }


def start(case: TrainingCase, stack: ExitStack) -> Configuration:
    """Start a configuration and train its first step.

    Raises RuntimeError with the last output if a process exits or hangs.
    """
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
    configuration = Configuration(case, processes, [by_rank[rank] for rank in sorted(by_rank)])
    configuration.start_seconds = configuration.turn()["at"] - begin
    return configuration


def run_rounds(configurations: list[Configuration]) -> None:
    """Run all remaining turns, in rounds; every other round is in reverse order."""
    rounds = len(configurations[0].case.turns) - 1
    for number in range(rounds):
        for configuration in configurations[:: -1 if number % 2 else 1]:
            configuration.turns.append(configuration.turn())


def wait_for_all(configurations: list[Configuration]) -> None:
    """Wait until all processes have exited."""
    for configuration in configurations:
        for process in configuration.processes:
            process.wait(TIMEOUT)


def _process(case: TrainingCase, rank: int, stack: ExitStack) -> subprocess.Popen[bytes]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks}
    environment = os.environ | {key: str(value) for key, value in variables.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port(case))}
    environment |= {"OMP_NUM_THREADS": str(case.threads), "DS_ACCELERATOR": "cpu"}
    with Path(case.folder, f"log-{rank}.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(case.as_json())],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    stack.callback(_kill, process)
    return process


def _port(case: TrainingCase) -> int:
    """Return a free port, the same for all ranks of a configuration."""
    path = Path(case.folder, "port")
    if not path.exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            path.write_text(str(free.getsockname()[1]), encoding="ascii")
    return int(path.read_text(encoding="ascii"))


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _receive(configuration: Configuration, connection: Connection) -> dict[str, Any]:
    begin = time.time()
    while not connection.poll(1.0):
        _check(configuration.case, configuration.processes, begin)
    try:
        message: dict[str, Any] = connection.recv()
    except EOFError:
        raise _failure(configuration.case) from None
    return message


def _check(case: TrainingCase, processes: list[subprocess.Popen[bytes]], begin: float) -> None:
    if any(process.poll() for process in processes):
        raise _failure(case)
    if time.time() - begin > TIMEOUT:
        raise RuntimeError(f"{case.configuration}: no response for {TIMEOUT:.0f} s")


def _failure(case: TrainingCase) -> RuntimeError:
    logs = sorted(Path(case.folder).glob("log-*.txt"))
    last = [log.read_text(encoding="utf-8", errors="replace")[-2000:] for log in logs]
    return RuntimeError("\n".join((f"{case.configuration} failed:", *last)))


def new_folder(stack: ExitStack) -> Path:
    """Create a temporary folder."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_training_")))
