"""Heartbeat server over its real TCP connection, and the watchdog that uses it."""

import socket
import time
from collections.abc import Iterator

import pytest

import megagrow.train.fault_tolerance.watchdog
from megagrow.errors import PeerLost
from megagrow.train.fault_tolerance.heartbeat import (
    HeartbeatClient,
    HeartbeatEndpoint,
    HeartbeatServer,
)
from megagrow.train.fault_tolerance.watchdog import Watchdog


@pytest.fixture
def server() -> HeartbeatServer:
    return HeartbeatServer()


@pytest.fixture
def remote(server: HeartbeatServer) -> Iterator[HeartbeatClient]:
    endpoint = HeartbeatEndpoint(server)
    yield HeartbeatClient("localhost", endpoint.port, endpoint.token)
    endpoint.close()


def test_ranks_read_the_heartbeats_of_others(
    server: HeartbeatServer, remote: HeartbeatClient
) -> None:
    assert server.report(0, 7, "step 3") == 0
    assert remote.report(1, 8, "step 4") == 0
    heartbeats = remote.heartbeats()
    assert {rank: (beat.phases, beat.phase) for rank, beat in heartbeats.items()} == {
        0: (7, "step 3"),
        1: (8, "step 4"),
    }
    assert all(0 <= beat.age < 5 for beat in heartbeats.values())


def test_the_first_abort_code_counts(server: HeartbeatServer, remote: HeartbeatClient) -> None:
    assert remote.abort(5)
    assert not server.abort(4)
    assert remote.report(1, 0, "startup") == server.report(0, 0, "startup") == 5


def test_requests_without_the_token_are_ignored(
    server: HeartbeatServer, remote: HeartbeatClient
) -> None:
    stranger = HeartbeatClient("localhost", remote.port, "guessed")
    with pytest.raises(OSError, match="no answer"):
        stranger.abort(4)
    with socket.create_connection(("localhost", remote.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\n")
        assert connection.recv(100) == b""
    assert server.report(0, 0, "startup") == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("TICK", 0.02), ("SILENT_SECONDS", 0.2), ("STAY_SECONDS", 0.05)):
        monkeypatch.setattr(megagrow.train.fault_tolerance.watchdog, name, seconds)


@pytest.mark.usefixtures("quick")
def test_a_long_phase_may_take_longer(
    server: HeartbeatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    with Watchdog(server, 0, timeout=0.3, end=codes.append) as watchdog:
        watchdog.beat("a growth", long=True)
        time.sleep(0.6)
        assert codes == []
        watchdog.beat("step 1")
        time.sleep(1.2)
    assert set(codes) == {4}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no progress in step 1 for 0 s; all ranks respond")


@pytest.mark.usefixtures("quick")
def test_no_timeout_is_no_end(server: HeartbeatServer) -> None:
    codes: list[int] = []
    with Watchdog(server, 0, timeout=None, end=codes.append):
        time.sleep(0.5)
    assert codes == []


@pytest.mark.usefixtures("quick")
def test_a_lost_peer_is_reported_once(server: HeartbeatServer) -> None:
    with Watchdog(server, 0, timeout=None, end=lambda code: None) as watchdog:
        watchdog.raise_if_peer_lost()
        server.report(1, 3, "step 2")
        with pytest.raises(
            PeerLost, match=r"rank 1 is unresponsive .*step 2.; aborting all"
        ) as found:
            watchdog.raise_if_peer_lost()
        assert found.value.is_reporter
        with pytest.raises(PeerLost) as found:
            watchdog.raise_if_peer_lost()
        assert not found.value.is_reporter
