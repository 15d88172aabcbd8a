"""Start megagrow commands of one checkout: on several ranks, in one process, or under torchrun."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

WORKER = Path(__file__).with_name("worker.py")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START_SECONDS, COMMAND_SECONDS, PEER_SECONDS = 180.0, 180.0, 30.0
"""Time limits: imports, a command, and the other ranks once one of them has failed."""


class CommandFailed(Exception):
    """A command of a checkout failed or hung."""


def environment(checkout: Path) -> list[str]:
    """The `env` command that selects a checkout; rank variables of the caller are removed."""
    path = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    removed = [word for name in RANK_VARIABLES for word in ("-u", name)]
    threads = [f"{name}_NUM_THREADS=1" for name in ("OMP", "OPENBLAS", "MKL")]
    return ["env", *removed, f"PYTHONPATH={path}", "DS_ACCELERATOR=cpu", *threads]


def torchrun(checkout: Path, world: int, folder: Path, arguments: list[str]) -> None:
    """Run a command on `world` ranks under torchrun. Raises CommandFailed."""
    log = folder / "torchrun.log"
    command = [*environment(checkout), sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", f"--nproc-per-node={world}", "-m", "megagrow", *arguments]
    with log.open("wb") as file:
        code = subprocess.run(command, cwd=folder, stdout=file, stderr=file).returncode
    _check(code, arguments, log)


@dataclass
class _WorkerProcess:
    """One worker process."""

    process: subprocess.Popen[bytes]
    answers: IO[bytes]

    def send(self, command: dict[str, object]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Workers:
    """Processes of one checkout that run commands one after another, on all ranks.

    They start with the first command. A command that fails on one rank kills all processes; the
    next command starts new ones.
    """

    def __init__(self, checkout: Path, world: int, log: Path) -> None:
        """Create `world` ranks; a single rank runs without launcher variables."""
        self._checkout = checkout
        self._world = world
        self._log = log
        self._workers: list[_WorkerProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.end()

    def run(self, folder: Path, arguments: list[str]) -> None:
        """Run `megagrow ARGUMENTS` in a folder. Raises CommandFailed."""
        if not self._workers:
            self._start()
        logs = [folder / f"{arguments[0]}-{rank}.log" for rank in range(self._world)]
        for worker, log in zip(self._workers, logs, strict=True):
            command: dict[str, object] = {"folder": str(folder), "log": str(log)}
            command["arguments"] = arguments
            worker.send(command)
        codes = self._answers(COMMAND_SECONDS)
        for code, log in zip(codes, logs, strict=True):
            _check(int(code or -1), arguments, log)

    def end(self) -> None:
        """Kill all processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _start(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        with ExitStack() as stack:
            log = stack.enter_context(self._log.open("ab"))
            for rank in range(self._world):
                values = (rank, rank, self._world, "127.0.0.1", port)
                pairs = zip(RANK_VARIABLES, values, strict=True)
                ranks = [f"{name}={value}" for name, value in pairs] if self._world > 1 else []
                process = subprocess.Popen(
                    [*environment(self._checkout), *ranks, sys.executable, "-P", str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
                assert process.stdout is not None
                self._workers.append(_WorkerProcess(process, process.stdout))
        for package in self._answers(START_SECONDS):
            if package is None:
                raise CommandFailed(f"a worker did not start; see {self._log}")
            if not Path(package).is_relative_to(self._checkout):
                raise CommandFailed(f"{package} is imported instead of {self._checkout}/megagrow")

    def _answers(self, seconds: float) -> list[str | None]:
        """Read one line per worker, None for one that died or timed out.

        If one is None, all workers are killed.
        """
        answers: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        waiting = {worker.answers.fileno(): rank for rank, worker in enumerate(self._workers)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select(list(waiting), [], [], left)
            for descriptor in ready:
                rank = waiting.pop(descriptor)
                answers[rank] = self._workers[rank].answers.readline().decode().strip()
                if answers[rank] != "0" and not answers[rank].endswith(".py"):
                    deadline = min(deadline, time.monotonic() + PEER_SECONDS)
        lines_by_rank = [answers.get(rank) or None for rank in range(len(self._workers))]
        if None in lines_by_rank:
            self.end()
        return lines_by_rank


def _check(code: int, arguments: list[str], log: Path) -> None:
    if code != 0:
        lines = (
            log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        )
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        words = " ".join(arguments)
        raise CommandFailed(f"`megagrow {words:.80}` exited with {code}, see {log}: {last:.200}")
