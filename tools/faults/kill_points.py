"""Lose one rank at every point of a run and measure when and how the other ranks exit.

    python tools/faults/kill_points.py --ranks 3

At each point of `POINTS` one rank of a small run with a growth is killed (SIGKILL) or frozen
(SIGSTOP), once rank 0 and once the last rank. The other ranks must exit with code 5 (a killed rank)
or 4 (a frozen rank) within seconds, print one line that names the lost rank, and print no
traceback. The exit code is 1 if they do not.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from megagrow.common.directory_lock import DirectoryLock  # noqa: E402
from tools.faults.run import (  # noqa: E402
    import_all,
    log_of,
    read_text,
    run_of,
    start_ranks,
    write_corpora,
)

LIMIT = 9.0
"""Seconds until all other ranks must have exited, after the fault or the limit of the phase."""
LONG_PHASE = 6
"""Factor on hang_timeout in most phases."""
JOIN_SECONDS = 4.0
"""Time for all ranks to join, where one does not."""
START_LIMIT = 90.0
"""Seconds until the fault must have happened."""
HEARTBEAT_SECONDS = 0.8
"""Time before the fault, in which the rank sends a heartbeat of its phase."""
PEER_LOST, HANG = 5, 4
WATCHDOG = "megagrow.train.fault_tolerance.watchdog"
DIST_MODULE = "megagrow.parallel.process_groups"


@dataclass(frozen=True)
class Point:
    """A function of the run in which a rank is lost: before its call number `call`."""

    module: str
    function: str
    call: int = 1
    delay: float = 0.0
    """Seconds from the call to the fault; the call continues in the meantime."""
    joins: bool = True
    """False if the rank does not join, which the others wait for until a timeout."""
    lock_is_held: bool = False
    """Another process holds the lock of the run directory."""


POINTS = {
    "launch": Point(WATCHDOG, "join_store", joins=False),
    "joining": Point(WATCHDOG, "wait_for_ranks"),
    "process group": Point("torch.distributed", "init_process_group"),
    "kernel check": Point("megagrow.run", "check_kernels"),
    "data set-up": Point("megagrow.run", "open_inputs_on_all_ranks"),
    "lock": Point("megagrow.run", "lock_directory"),
    "waiting for the lock": Point("megagrow.run", "lock_directory", delay=1.0, lock_is_held=True),
    "first files": Point("megagrow.run", "Checkpointer"),
    "start of the run": Point("megagrow.run", "begin"),
    "process groups of the first stage": Point(DIST_MODULE, "dist.new_group"),
    "warm-up": Point("megagrow.run", "_prepare"),
    "first step": Point("megagrow.train.loop", "train_step"),
    "step": Point("megagrow.train.loop", "train_step", 5),
    "validation": Point("megagrow.run", "_validate"),
    "save": Point("megagrow.run", "_save"),
    "growth": Point("megagrow.run", "grow_best"),
    "engine of the growth": Point("megagrow.train.growth_event.event", "build_stage"),
    "last save": Point("megagrow.run", "_save", 7),
    "last barrier": Point(DIST_MODULE, "dist.barrier"),
}


@dataclass(frozen=True)
class Result:
    """Exit of the peers of a lost rank."""

    seconds: float
    """Seconds from the fault until the last peer had exited."""
    codes: tuple[int | None, ...]
    """Exit codes of the peers; None if still running."""
    lines: tuple[str, ...]
    """Error lines of the peers."""
    problem: str


def arm(point: Point, fault: Callable[[], None]) -> None:
    """Call `fault` in this process when the point is reached."""
    module: Any = importlib.import_module(point.module)
    calls = [0]
    owner, name = module, point.function
    if point.function.startswith("dist."):  # only this module's calls, not those of DeepSpeed
        owner, name = SimpleNamespace(**vars(module.dist)), point.function.removeprefix("dist.")
        module.dist = owner
    original = getattr(owner, name)

    def patched(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == point.call and point.delay:
            threading.Timer(point.delay, fault).start()
        elif calls[0] == point.call:
            fault()
        return original(*arguments, **options)

    setattr(owner, name, patched)


def lose(number: int, marker: Path) -> None:
    """Send a signal to this process, after a heartbeat of its phase; `marker` has the time."""
    time.sleep(HEARTBEAT_SECONDS)
    marker.write_text(str(time.time()), encoding="utf-8")
    os.kill(os.getpid(), number)


def run_point(
    folder: Path, name: str, ranks: int, victim: int, number: int, hang_timeout: float = 2.0
) -> Result:
    """Start a run, lose rank `victim` by a signal at a point and return the exit of the peers.

    Args:
        folder: new folder; its parent has the corpus `train`.
        name: key of POINTS.
        ranks: number of ranks.
        number: SIGKILL or SIGSTOP.
        hang_timeout: guards.hang_timeout of a run with a frozen rank.
    """
    point, frozen = POINTS[name], number == signal.SIGSTOP
    output, path, marker = folder / "run", folder / "run.yaml", folder / "lost"
    output.mkdir()
    values = run_of(folder.parent / "train", output, ranks)
    values["guards"] = {"hang_timeout": hang_timeout if frozen else 600}
    path.write_text(json.dumps(values), encoding="utf-8")

    def hook(rank: int) -> None:
        watchdog: Any = importlib.import_module(WATCHDOG)
        watchdog.JOIN_SECONDS = watchdog.JOIN_SECONDS if point.joins else JOIN_SECONDS
        if rank == victim:
            arm(point, partial(lose, number, marker))

    with DirectoryLock(output) if point.lock_is_held else nullcontext():
        processes = start_ranks(path, ranks, hook)
        peers = [process for rank, process in enumerate(processes) if rank != victim]
        _wait(lambda: marker.exists() or _ended(processes), START_LIMIT)
        _wait(lambda: _ended(peers), LIMIT + LONG_PHASE * hang_timeout * frozen)
    seconds = time.time() - float(read_text(marker) or "nan")
    codes = tuple(process.exitcode for process in peers)
    for process in processes:
        process.kill()
        process.join()
    texts = [read_text(log_of(path, rank)) for rank in range(ranks) if rank != victim]
    code = HANG if frozen and point.joins else PEER_LOST
    return Result(seconds, codes, *_judge(texts, codes, victim, code))


def _judge(
    texts: list[str], codes: Iterable[int | None], victim: int, code: int
) -> tuple[tuple[str, ...], str]:
    """Return the error lines of the peers, and what is wrong with their exit or ""."""
    lines = tuple(line for text in texts for line in text.splitlines() if "error: " in line)
    if None in codes:
        return lines, "peers still run"
    if set(codes) != {code}:
        return lines, f"exit codes {sorted({*codes}, key=str)} instead of {code}"
    if any(word in text for text in texts for word in ("Traceback", "frame #", "[c10d]")):
        return lines, "a traceback of Python or torch"
    if not any(f"rank {victim}" in line for line in lines):
        return lines, f"no line names rank {victim}"
    return lines, ""


def _ended(processes: Iterable[Any]) -> bool:
    return not any(process.is_alive() for process in processes)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def main(
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of each run.")] = 3,
    only: Annotated[str, typer.Option(help="Names of points that contain this text.")] = "",
    freeze: Annotated[bool, typer.Option(help="Also freeze ranks.")] = True,
) -> None:
    """Lose a rank at every point and check the exit of the others."""
    import_all()
    row = "{:<36}{:<8}{:>5}{:>9}  {:<12}{}"
    failed = 0
    print(row.format("point", "fault", "rank", "seconds", "codes", "line or problem"))
    with tempfile.TemporaryDirectory() as temporary:
        write_corpora(Path(temporary) / "train")
        faults = {"kill": signal.SIGKILL} | ({"freeze": signal.SIGSTOP} if freeze else {})
        for name in (name for name in POINTS if only in name):
            for fault, number in faults.items():
                for victim in (0, ranks - 1):
                    folder = Path(tempfile.mkdtemp(dir=temporary))
                    result = run_point(folder, name, ranks, victim, number)
                    failed += bool(result.problem)
                    codes = ",".join(map(str, result.codes))
                    text = result.problem and f"FAILED: {result.problem} | "
                    text += " | ".join(sorted({*result.lines}))
                    seconds = f"{result.seconds:.1f}"
                    print(row.format(name, fault, victim, seconds, codes, text), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
