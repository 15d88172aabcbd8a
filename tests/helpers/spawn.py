"""Runs a function on several gloo ranks of this machine, for tests of anything distributed."""

import gc
import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  (slow; DeepSpeed imports it late)

import megagrow.run  # noqa: F401  (everything that a rank imports, once for all of them)

# Forked ranks share the parent's imports, which cost most of a start. The parent must then not
# have started OpenMP threads: conftest.py holds every process of the tests to one.
_FORK = multiprocessing.get_context("fork")
# A fork of a process that has imported the same, and done nothing else: for tests that measure.
_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["tests.helpers.spawn"])


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 240, fresh: bool = False
) -> list:
    """function(*args) on each of `world` ranks, its process group made; results by rank.

    With `fresh` the ranks inherit nothing of the tests that ran before. A rank that fails or hangs
    ends all of them and fails the test with its traceback.
    """
    context: Any = _FRESH if fresh else _FORK
    results = context.Queue()
    port = free_port()
    gc.freeze()  # a collection in a rank would copy every page that it shares with the parent
    ranks = [
        context.Process(target=_run, args=(rank, world, port, results, function, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(ranks, results, time.monotonic() + timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _run(rank: int, world: int, port: int, results: Any, function: Callable, args: tuple) -> None:
    os.environ.update(rank_environment(rank, world, port))
    from megagrow.parallel.launch import read_launch
    from megagrow.parallel.process_groups import init_process_group, leave_process_group

    try:
        init_process_group(read_launch())
        result = pickle.dumps(function(*args))
        results.put((rank, result, None))
        leave_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _collect(ranks: list, results: Any, deadline: float) -> list:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            rank, result, error = results.get(timeout=1)
        except queue.Empty:
            late = time.monotonic() > deadline
            dead = [p for i, p in enumerate(ranks) if i not in found and p.exitcode is not None]
            if late or dead:
                missing = [i for i in range(len(ranks)) if i not in found]
                raise AssertionError(f"ranks {missing} {'hang' if late else 'died'}") from None
            continue
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        found[rank] = pickle.loads(result)
    return [found[rank] for rank in range(len(ranks))]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the environment that a launcher sets for a rank of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
