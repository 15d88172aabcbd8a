"""Runs as jobs: the command line on several forked ranks that can be watched, signalled, killed."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import megagrow.cli.app
from megagrow.config.load import to_yaml
from megagrow.config.schema import RunConfig
from megagrow.train.reporting.metrics import read_metrics
from tests.helpers.spawn import free_port, rank_environment

_FORK = multiprocessing.get_context("fork")

Hook = Callable[[int, pytest.MonkeyPatch], None]
"""Patch of a rank, applied before it starts: hook(rank, patch)."""


@dataclass(frozen=True)
class Finished:
    """Result of a job, by rank."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Job:
    """`megagrow ARGUMENTS` on `world` ranks of this machine, its output kept in files."""

    def __init__(
        self, folder: Path, world: int, arguments: Iterable[str], hook: Hook | None = None
    ) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        port, words = free_port(), ["megagrow", *arguments]
        self.ranks = [
            _FORK.Process(target=_run, args=(rank, world, port, words, folder, hook))
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def signal(self, number: int) -> None:
        """Sends a signal to all ranks at once, as a launcher does."""
        for process in self.ranks:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def wait_for(self, happened: Callable[[], Any], timeout: float = 60) -> None:
        """Returns at the moment when something has happened; fails if the job ends before."""
        deadline = time.monotonic() + timeout
        while not happened():
            alive = [process.is_alive() for process in self.ranks]
            if not all(alive) or time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"it never happened; alive: {alive}\n{self._read('err')}")
            time.sleep(0.001)

    def kill(self) -> None:
        """SIGKILL to all ranks; fails if one had ended by itself."""
        self.signal(signal.SIGKILL)
        assert self.finish().codes == [-signal.SIGKILL] * len(self.ranks)

    def finish(self, timeout: float = 60) -> Finished:
        """Waits for all ranks. One that hangs fails the test."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.signal(signal.SIGKILL)
        for process in self.ranks:
            process.join()
        if hanging:
            raise AssertionError(f"ranks {hanging} hang; stderr: {self._read('err')}")
        codes = [process.exitcode or 0 for process in self.ranks]
        return Finished(codes, self._read("out"), self._read("err"))

    def _read(self, kind: str) -> list[str]:
        paths = [self._folder / f"{rank}.{kind}" for rank in range(len(self.ranks))]
        return [path.read_text() if path.exists() else "" for path in paths]


def _run(
    rank: int, world: int, port: int, words: list[str], folder: Path, hook: Hook | None
) -> None:
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        stream.flush()
        with (folder / f"{rank}.{kind}").open("wb") as file:
            os.dup2(file.fileno(), 1 if kind == "out" else 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(rank_environment(rank, world, port))
    sys.argv = words
    gc.freeze()  # a collection would copy every page that is still shared with the parent
    if hook is not None:
        hook(rank, pytest.MonkeyPatch())
    megagrow.cli.app.main()


def write_run(path: Path, run: RunConfig) -> Path:
    """The run file of a config."""
    path.write_text(to_yaml(run), encoding="utf-8")
    return path


def train(path: Path, world: int, hook: Hook | None = None) -> Job:
    """`megagrow train PATH` on several ranks."""
    return Job(path.parent / f"{path.stem}-output", world, ["train", str(path)], hook)


def records(run: RunConfig, kind: str, fields: Iterable[str]) -> list[tuple[Any, ...]]:
    """Some fields of all records of one kind, as the run has written them down so far."""
    path = run.output_dir / "metrics.jsonl"
    found = read_metrics(path) if path.exists() else []
    return [tuple(r[field] for field in fields) for r in found if r["kind"] == kind]
