"""The notice board, over its real connection, and what the watchdog makes of it."""

import socket
import time
from collections.abc import Iterator

import pytest

import megagrow.train.fault_tolerance.watchdog
from megagrow.errors import PeerLost
from megagrow.train.fault_tolerance.heartbeat import BoardServer, HeartbeatServer, RemoteBoard
from megagrow.train.fault_tolerance.watchdog import Watchdog


@pytest.fixture
def board() -> HeartbeatServer:
    return HeartbeatServer()


@pytest.fixture
def remote(board: HeartbeatServer) -> Iterator[RemoteBoard]:
    server = BoardServer(board)
    yield RemoteBoard("localhost", server.port, server.token)
    server.close()


def test_what_one_rank_tells_the_others_read(board: HeartbeatServer, remote: RemoteBoard) -> None:
    assert board.tell(0, 7, "step 3") == 0
    assert remote.tell(1, 8, "step 4") == 0
    signs = remote.signs()
    assert {rank: (sign.phases, sign.phase) for rank, sign in signs.items()} == {
        0: (7, "step 3"),
        1: (8, "step 4"),
    }
    assert all(0 <= sign.age < 5 for sign in signs.values())


def test_the_first_announcement_counts(board: HeartbeatServer, remote: RemoteBoard) -> None:
    assert remote.announce(5)
    assert not board.announce(4)
    assert remote.tell(1, 0, "the start") == board.tell(0, 0, "the start") == 5


def test_who_does_not_know_the_token_is_not_heard(
    board: HeartbeatServer, remote: RemoteBoard
) -> None:
    stranger = RemoteBoard("localhost", remote.port, "guessed")
    with pytest.raises(OSError, match="no answer"):
        stranger.announce(4)
    with socket.create_connection(("localhost", remote.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\n")
        assert connection.recv(100) == b""
    assert board.tell(0, 0, "the start") == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("TICK", 0.02), ("SILENT_SECONDS", 0.2), ("STAY_SECONDS", 0.05)):
        monkeypatch.setattr(megagrow.train.fault_tolerance.watchdog, name, seconds)


@pytest.mark.usefixtures("quick")
def test_a_long_phase_may_take_longer(
    board: HeartbeatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    with Watchdog(board, 0, timeout=0.3, end=codes.append) as watchdog:
        watchdog.beat("a growth", long=True)
        time.sleep(0.6)
        assert codes == []
        watchdog.beat("step 1")
        time.sleep(1.2)
    assert set(codes) == {4}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no progress in step 1 for 0 s; no rank is missing")


@pytest.mark.usefixtures("quick")
def test_no_timeout_is_no_end(board: HeartbeatServer) -> None:
    codes: list[int] = []
    with Watchdog(board, 0, timeout=None, end=codes.append):
        time.sleep(0.5)
    assert codes == []


@pytest.mark.usefixtures("quick")
def test_a_failure_is_that_of_a_rank_that_was_not_heard_of(board: HeartbeatServer) -> None:
    with Watchdog(board, 0, timeout=None, end=lambda code: None) as watchdog:
        watchdog.raise_if_peer_lost()
        board.tell(1, 3, "step 2")
        with pytest.raises(
            PeerLost, match=r"rank 1 gives no sign of life.*in step 2; all"
        ) as found:
            watchdog.raise_if_peer_lost()
        assert found.value.is_reporter
        with pytest.raises(PeerLost) as found:
            watchdog.raise_if_peer_lost()
        assert not found.value.is_reporter
