"""Heartbeat server over its real TCP connections: requests, exits of processes, and attacks."""

import errno
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest

from megagrow.parallel.launch import Launch
from megagrow.parallel.rendezvous import join_store
from megagrow.train.fault_tolerance import heartbeat_client, heartbeat_endpoint
from megagrow.train.fault_tolerance.heartbeat import HeartbeatServer
from megagrow.train.fault_tolerance.heartbeat_client import HeartbeatClient
from megagrow.train.fault_tolerance.heartbeat_endpoint import (
    SPARE_CONNECTIONS,
    HeartbeatAddress,
    HeartbeatEndpoint,
    challenge_response,
)
from tests.helpers.logs import captured_logs
from tests.helpers.spawn import run_ranks

WORLD = 3
IDLE = 1100
"""Idle connections of an attack, more than many systems allow a process to have."""


@pytest.fixture
def server() -> HeartbeatServer:
    return HeartbeatServer(WORLD, "host")


@pytest.fixture
def endpoint(server: HeartbeatServer) -> Iterator[HeartbeatEndpoint]:
    endpoint = HeartbeatEndpoint(server, WORLD, "127.0.0.1")
    yield endpoint
    endpoint.close(announce=False)


def client_of(endpoint: HeartbeatEndpoint, rank: int = 1, token: str = "") -> HeartbeatClient:
    address = HeartbeatAddress(("127.0.0.1",), endpoint.port, token or endpoint.token, "host")
    return HeartbeatClient(address, rank, "host")


@pytest.fixture
def remote(endpoint: HeartbeatEndpoint) -> Iterator[HeartbeatClient]:
    client = client_of(endpoint)
    yield client
    client.close(announce=False)


def happens(condition: Callable[[], Any], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_heartbeats_of_other_ranks_are_stored(
    server: HeartbeatServer, remote: HeartbeatClient
) -> None:
    assert server.report(0, 7, "step 3") == 0
    assert remote.report(1, 8, "step 4") == 0
    heartbeats = server.heartbeats()
    assert {rank: (beat.phases, beat.phase) for rank, beat in heartbeats.items()} == {
        0: (7, "step 3"),
        1: (8, "step 4"),
    }
    assert all(0 <= beat.age < 5 for beat in heartbeats.values())
    assert remote.missing(5.0) == server.missing(5.0)
    assert server.missing(5.0).behind == "rank 0 is alive but behind (last heartbeat: step 3)"
    assert server.missing(5.0).unknown == "no heartbeat connection with rank 2"


def test_the_first_abort_code_counts(server: HeartbeatServer, remote: HeartbeatClient) -> None:
    assert remote.abort(5)
    assert not server.abort(4)
    assert remote.report(1, 0, "startup") == server.report(0, 0, "startup") == 5


def test_a_closed_connection_is_an_exit(
    server: HeartbeatServer, endpoint: HeartbeatEndpoint, remote: HeartbeatClient
) -> None:
    remote.report(1, 3, "step 2")
    assert server.exited(0.0) == ""
    remote.close(announce=False)
    text = "rank 1 exited or was killed (last heartbeat: step 2)"
    assert happens(lambda: server.exited(0.0) == text)
    assert server.exited(60.0) == ""
    assert server.missing(60.0).lost == text
    again = client_of(endpoint)  # the network was at fault: the rank connects again
    again.report(1, 4, "step 3")
    assert server.exited(0.0) == server.missing(60.0).lost == ""
    again.close()
    assert happens(lambda: server.missing(60.0).lost != "")
    assert server.exited(0.0) == "", "the exit was announced"


def test_the_exit_of_rank_0_is_not_its_silence(
    endpoint: HeartbeatEndpoint, remote: HeartbeatClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client_of(endpoint, 2, "guessed").missing(0.0).unknown == (
        "no heartbeat connection with rank 0"
    )
    remote.report(1, 0, "startup")
    monkeypatch.setattr(heartbeat_client, "ANSWER_SECONDS", 0.1)
    with monkeypatch.context() as patch:  # frozen
        patch.setattr(endpoint, "_send", lambda connection, message: time.sleep(0.2))
        with pytest.raises(TimeoutError):
            remote.report(1, 1, "step 1")
        assert remote.exited(0.0) == ""
        assert remote.missing(0.0).lost == "rank 0 does not answer"
        assert remote.missing(60.0).lost == "", "not for so long"
    assert happens(lambda: answers(remote)), "it went on"
    assert remote.missing(0.5).lost == ""
    endpoint.close(announce=False)
    assert not answers(remote)
    assert remote.exited(0.0) == remote.missing(60.0).lost == "rank 0 exited or was killed"


def answers(client: HeartbeatClient) -> bool:
    try:
        return client.report(1, 2, "step 2") == 0
    except OSError:
        return False


def test_an_announced_end_of_rank_0_is_no_exit(
    endpoint: HeartbeatEndpoint, remote: HeartbeatClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_endpoint, "LEAVE_SECONDS", 0.1)
    remote.report(1, 0, "startup")
    endpoint.close()
    assert not answers(remote)
    assert remote.exited(0.0) == ""
    assert remote.missing(60.0).lost == "rank 0 has exited"


def connection(endpoint: HeartbeatEndpoint) -> socket.socket:
    return socket.create_connection(("127.0.0.1", endpoint.port), timeout=5)


def is_closed(link: socket.socket) -> bool:
    try:
        return link.recv(100) == b""
    except ConnectionResetError:
        return True


def proof_of(endpoint: HeartbeatEndpoint, link: socket.socket, rank: Any = 2) -> bytes:
    """The right answer to the challenge of a connection."""
    challenge = json.loads(link.recv(4096))
    return line(rank, "host", challenge_response(endpoint.token, challenge, rank, "host"))


def line(*message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def test_connections_without_the_token_are_closed(
    server: HeartbeatServer, endpoint: HeartbeatEndpoint
) -> None:
    with connection(endpoint) as link:
        accepted = proof_of(endpoint, link)
        link.sendall(accepted + line(1, "report", 1, "step 1"))
        assert json.loads(link.recv(100)) == [1, 0]
    wrong = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff" * 5000,
        b"[" * 4000 + b"\n",
        line(1, "abort", 4),
        accepted,  # replayed
    ]
    for message in wrong:
        with connection(endpoint) as link:
            link.recv(4096)
            link.sendall(message)
            assert is_closed(link), message[:80]
    for rank in (0, WORLD, -1, True, "2", 1e300):  # with the token
        with connection(endpoint) as link:
            link.sendall(proof_of(endpoint, link, rank))
            assert is_closed(link), rank
    with connection(endpoint) as link:
        link.sendall(proof_of(endpoint, link)[:-4] + b'"]\n')  # a part of the token
        assert is_closed(link)
    with pytest.raises(OSError, match="no answer"):
        client_of(endpoint, 2, "guessed").abort(4)
    assert server.report(0, 0, "startup") == 0


@pytest.mark.parametrize(
    "message",
    [
        line(1, "abort", 0),
        line(1, "abort", 1),
        line(1, "report", "one", 2),
        line(1, "report"),
        line(1, "report", float("inf"), ""),
        line(1, "unknown"),
        line(),
        b"7\n",
        b"x" * 5000,
    ],
)
def test_wrong_requests_end_their_connection_only(
    server: HeartbeatServer, endpoint: HeartbeatEndpoint, remote: HeartbeatClient, message: bytes
) -> None:
    with connection(endpoint) as link:
        link.sendall(proof_of(endpoint, link))
        link.sendall(message)
        assert is_closed(link)
    assert remote.report(1, 0, "startup") == 0
    assert server.exited(0.0) == ""


def test_an_attack_neither_ends_the_run_nor_delays_heartbeats(
    server: HeartbeatServer, endpoint: HeartbeatEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_endpoint, "AUTHENTICATION_SECONDS", 0.3)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    remote, slowest, most = client_of(endpoint), 0.0, 0
    with ExitStack() as stack:
        for number in range(IDLE):
            link = stack.enter_context(connection(endpoint))
            if number % 10 == 0:
                link.send(b'["garbage' * 10)
            if number % 50 == 0:
                begin = time.monotonic()
                assert remote.report(1, number, "step 1") == 0
                slowest = max(slowest, time.monotonic() - begin)
                most = max(most, endpoint.connections)
        late = client_of(endpoint, 2)  # a rank that joins during the attack
        assert late.report(2, 0, "startup") == 0
        assert happens(lambda: endpoint.connections == WORLD - 1), "idle ones are closed"
    assert WORLD < most <= WORLD + SPARE_CONNECTIONS
    assert slowest < heartbeat_client.ANSWER_SECONDS
    assert server.exited(0.0) == "" and server.report(0, 0, "step 1") == 0
    for client in (late, remote):
        client.close()


def test_without_file_descriptors_open_connections_are_served(
    endpoint: HeartbeatEndpoint, remote: HeartbeatClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_endpoint, "PAUSE_SECONDS", 0.1)
    assert remote.report(1, 0, "startup") == 0

    class Full:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        def fileno(self) -> int:
            return listener.fileno()

    listener = endpoint._listener
    with captured_logs() as messages:
        monkeypatch.setattr(endpoint, "_listener", Full())
        with connection(endpoint) as link:
            assert happens(lambda: messages)
            assert remote.report(1, 1, "step 1") == 0
            monkeypatch.setattr(endpoint, "_listener", listener)
            assert json.loads(link.recv(100)), "it is accepted later"
    assert messages == [
        "the heartbeat server failed on a connection (OSError: [Errno 24] Too many open files); "
        "training continues"
    ]


def heartbeats_with_few_files(ranks: int) -> int:
    """Count the ranks whose heartbeats arrive where a process may open few files at first."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + ranks, hard))
    join_store(Launch(0, 1, 0), timedelta(seconds=1))
    server = HeartbeatServer(ranks, "host")
    endpoint = HeartbeatEndpoint(server, ranks, "127.0.0.1")
    clients = [client_of(endpoint, rank) for rank in range(1, ranks)]
    for rank, client in enumerate(clients, 1):
        client.report(rank, 1, "step 1")
    return len(server.heartbeats())


@pytest.mark.dist
def test_the_connections_of_many_ranks_do_not_end_at_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat_endpoint, "BATCH_SECONDS", 0.001)
    assert run_ranks(1, heartbeats_with_few_files, 80) == [79]
