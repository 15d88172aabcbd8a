"""The watchdog in one process: its limits, lost ranks, and its own failures."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

import megagrow.parallel.launch
import megagrow.train.fault_tolerance.watchdog as module
from megagrow.errors import ConfigError, PeerLost
from megagrow.parallel.launch import Launch, listen_address
from megagrow.parallel.rendezvous import wait_for_ranks
from megagrow.train.fault_tolerance import heartbeat_endpoint
from megagrow.train.fault_tolerance.heartbeat import HeartbeatServer
from megagrow.train.fault_tolerance.watchdog import Watchdog, collective_timeout, start_watchdog
from tests.helpers.logs import captured_logs

FIRST, SECOND = Launch(0, 2, 0), Launch(1, 2, 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("TICK", 0.02), ("SILENT_SECONDS", 0.2), ("STAY_SECONDS", 0.05)):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def server() -> HeartbeatServer:
    return HeartbeatServer(2)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield dist.HashStore()  # type: ignore[attr-defined]


def happens(condition: Callable[[], Any], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_long_phase_may_take_longer(
    server: HeartbeatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    server.report(1, 0, "startup")
    with Watchdog(server, 0, timeout=0.3, end=codes.append) as watchdog:
        time.sleep(0.4)  # ranks may join for much longer
        watchdog.beat("a growth", long=True)
        time.sleep(0.6)
        assert codes == []
        watchdog.beat("step 1")
        for _ in range(60):
            server.report(1, 9, "step 1")
            time.sleep(0.02)
    assert set(codes) == {4}
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: no progress in step 1 for 0 s; rank 0 is alive but behind (last heartbeat: "
        "step 1); aborting all ranks (guards.hang_timeout)"
    )


def test_a_silent_rank_ends_a_phase_that_waits_for_others(server: HeartbeatServer) -> None:
    codes: list[int] = []
    with Watchdog(server, 0, timeout=0.3, end=codes.append) as watchdog:
        server.report(1, 0, "startup")
        watchdog.beat("locking", at_least=60)
        assert happens(lambda: codes)
    assert set(codes) == {4}


def test_no_timeout_is_no_end(server: HeartbeatServer) -> None:
    codes: list[int] = []
    with Watchdog(server, 0, timeout=None, end=codes.append):
        time.sleep(0.5)
    assert codes == []


def test_a_lost_peer_is_reported_once(server: HeartbeatServer) -> None:
    codes: list[int] = []
    with Watchdog(server, 0, timeout=None, end=codes.append) as watchdog:
        watchdog.raise_if_peer_lost()
        server.report(1, 3, "step 2")
        with pytest.raises(
            PeerLost, match=r"rank 1 is unresponsive .*step 2.; aborting all"
        ) as found:
            watchdog.raise_if_peer_lost()
        assert found.value.is_reporter
        time.sleep(0.2)
        assert codes == [], "the main thread has time to print it"
        with pytest.raises(PeerLost) as found:
            watchdog.raise_if_peer_lost()
        assert not found.value.is_reporter


def pair(store: Any, codes: dict[int, list[int]]) -> list[Watchdog]:
    """The watchdogs of two ranks, over a connection."""
    watchdogs = [start_watchdog(launch, store, None) for launch in (FIRST, SECOND)]
    for rank, watchdog in enumerate(watchdogs):
        watchdog._end = codes.setdefault(rank, []).append
    return watchdogs


@pytest.mark.parametrize("victim", [0, 1])
def test_the_exit_of_a_rank_ends_the_others(
    store: Any, capsys: pytest.CaptureFixture[str], victim: int
) -> None:
    codes: dict[int, list[int]] = {}
    ranks = pair(store, codes)
    for watchdog in ranks:
        watchdog.__enter__()
        watchdog.beat("creating groups")
    time.sleep(0.1)
    # What the operating system does with the connections of an exited process.
    ranks[victim].__exit__(None, ValueError("a bug"), None)
    assert happens(lambda: codes[1 - victim])
    ranks[1 - victim].__exit__(None, None, None)
    assert set(codes[1 - victim]) == {5} and codes[victim] == []
    phase = " (last heartbeat: creating groups)" if victim else ""
    text = f"error: rank {victim} exited or was killed{phase}; aborting all ranks\n"
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("error", [None, ConfigError("of all ranks")], ids=["done", "invalid"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_planned_exit_ends_no_other_rank(store: Any, first: int, error: Exception | None) -> None:
    codes: dict[int, list[int]] = {}
    ranks = pair(store, codes)
    for watchdog in ranks:
        watchdog.__enter__()
    ranks[first].__exit__(None, error, None)
    time.sleep(0.4)
    ranks[1 - first].__exit__(None, error, None)
    assert codes == {0: [], 1: []}


def test_an_error_of_torch_becomes_the_loss_of_a_rank(store: Any) -> None:
    codes: dict[int, list[int]] = {}
    first, second = pair(store, codes)
    second.__enter__()
    with pytest.raises(PeerLost, match=r"^rank 1 exited or was killed .*joining"), first:
        time.sleep(0.1)
        second.__exit__(None, ValueError("a bug"), None)
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="a bug"), Watchdog(HeartbeatServer(1), 0, None):
        raise RuntimeError("a bug")


def test_failures_of_the_watchdog_end_no_run(
    store: Any, monkeypatch: pytest.MonkeyPatch, server: HeartbeatServer
) -> None:
    monkeypatch.setattr(heartbeat_endpoint, "listen_address", lambda launch: "203.0.113.1")
    codes: dict[int, list[int]] = {}
    with captured_logs() as messages:
        first, second = pair(store, codes)
        assert json.loads(store.get(module.ADDRESS_KEY))["addresses"] == []
        with first, second:
            time.sleep(0.1)
    assert [message.split(" (")[0] for message in messages] == [
        "the heartbeat server cannot listen at 203.0.113.1",
        "no heartbeat connection with rank 0",
    ]
    monkeypatch.setattr(server, "exited", lambda seconds: 1 / 0)
    with captured_logs() as messages, Watchdog(server, 0, 60, end=codes[0].append):
        assert happens(lambda: messages)
    assert [message.split(" (")[0] for message in messages] == ["the watchdog failed"]
    assert codes == {0: [], 1: []}


def test_ranks_that_do_not_join_are_named(store: Any) -> None:
    wait_for_ranks(Launch(0, 1, 0), store, timedelta(seconds=0.1))
    for rank in (0, 2):
        with pytest.raises(PeerLost) as found:
            wait_for_ranks(Launch(rank, 4, rank), store, timedelta(seconds=0.1))
        assert found.value.is_reporter == (rank == 0)
    assert str(found.value) == ("ranks 1, 3 did not join within 0 s; 2 of 4 ranks have joined")


def test_the_watchdog_acts_before_the_limit_of_collectives() -> None:
    assert collective_timeout(None) == collective_timeout(60) == timedelta(minutes=30)
    assert collective_timeout(600) > timedelta(seconds=module.LONG * 600)


@pytest.mark.parametrize(
    ("variables", "resolved", "address"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, ["127.0.0.1"], "127.0.0.1"),
        ({"MASTER_ADDR": "localhost"}, ["127.0.0.1"], "127.0.0.1"),
        ({"MASTER_ADDR": "node0", "LOCAL_WORLD_SIZE": "2"}, ["10.0.0.1"], "127.0.0.1"),
        ({"MASTER_ADDR": "node0", "LOCAL_WORLD_SIZE": "1"}, ["10.0.0.1"], "10.0.0.1"),
        ({"MASTER_ADDR": "node0"}, ["127.0.1.1", "10.0.0.1"], "10.0.0.1"),
        ({"MASTER_ADDR": "node0"}, ["127.0.1.1"], "10.0.0.9"),  # as Debian's /etc/hosts
        ({"MASTER_ADDR": "service"}, ["192.0.2.7"], "10.0.0.9"),  # of no interface here
        ({"MASTER_ADDR": "unknown"}, [], "10.0.0.9"),
    ],
)
def test_the_server_listens_where_other_ranks_reach_rank_0(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    resolved: list[str],
    address: str,
) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        if not resolved:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, 0)) for name in resolved]

    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch = megagrow.parallel.launch
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(launch, "_is_own", lambda name: name[:3] in ("127", "10."))
    monkeypatch.setattr(launch, "_default_route_address", lambda: "10.0.0.9")
    assert listen_address(FIRST) == address
