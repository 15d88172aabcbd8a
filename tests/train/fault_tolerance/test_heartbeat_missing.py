"""Names of missing ranks: ranks on one host, and hosts where there are several."""

from dataclasses import replace

import pytest

from megagrow.train.fault_tolerance.heartbeat import (
    HeartbeatServer,
    RankHeartbeat,
    ranks_behind,
    silent_ranks,
)
from megagrow.train.fault_tolerance.heartbeat_client import HeartbeatClient
from megagrow.train.fault_tolerance.heartbeat_endpoint import HeartbeatAddress

SECONDS = 2.0
HOSTS = ("a", "a", "b", "b", "c")


def signs(
    *silent: int, behind: tuple[int, ...] = (), hosts: tuple[str, ...] = HOSTS
) -> dict[int, RankHeartbeat]:
    """Those of five ranks, of which some were last heard of some time ago, in other steps."""
    return {
        rank: RankHeartbeat(
            phases=3 if rank in behind else 4,
            phase=f"step {rank}",
            age=10.0 - rank if rank in silent else 0.5,
            host=host,
        )
        for rank, host in enumerate(hosts)
    }


@pytest.mark.parametrize(
    ("silent", "words"),
    [
        ((), ""),
        (
            (3,),
            "rank 3 on b is unresponsive (last heartbeat: step 3)",
        ),
        (
            (2, 3),
            "host b (ranks 2, 3) is unresponsive: down or off the network (last heartbeat: step 3)",
        ),
        (
            (1, 4),
            "host c (rank 4) is unresponsive: down or off the network "
            "(last heartbeat: step 4); "
            "rank 1 on a is unresponsive (last heartbeat: step 1)",
        ),
    ],
)
def test_a_host_is_named_if_none_of_its_ranks_is_heard(silent: tuple[int, ...], words: str) -> None:
    assert silent_ranks(signs(*silent), SECONDS) == words


def test_on_one_host_ranks_are_named() -> None:
    assert silent_ranks(signs(2, 3, hosts=("a",) * 5), SECONDS) == (
        "rank 2 is unresponsive (last heartbeat: step 2); "
        "rank 3 is unresponsive (last heartbeat: step 3)"
    )


def test_of_many_ranks_some_are_named() -> None:
    server = HeartbeatServer(1024, "a")
    for rank in range(600):
        server.connect(rank, "a")
        server.disconnect(rank)
    lost, unknown = server.missing(SECONDS).lost, server.missing(SECONDS).unknown
    assert lost.startswith("rank 0 exited or was killed (last heartbeat: startup); rank 1 exited")
    assert lost.endswith("rank 7 exited or was killed (last heartbeat: startup); and 592 more")
    assert unknown.endswith("with ranks 600, 601, 602, 603, 604, 605, 606, 607 and 416 more")


def test_a_rank_without_an_answer_may_be_off_the_network_itself() -> None:
    address = HeartbeatAddress((), 0, "", "a")
    for host, words in (
        ("a", "rank 0 does not answer"),
        ("b", "rank 0 on a does not answer: frozen or dead, or a or b is off the network"),
    ):
        client = HeartbeatClient(address, 3, host)
        client._answered = 0.0
        assert client.missing(SECONDS).lost == words


def test_who_is_behind() -> None:
    assert ranks_behind(signs(behind=(4,))) == (
        "rank 4 on c is alive but behind (last heartbeat: step 4)"
    )
    assert ranks_behind(signs()) == ranks_behind({}) == ""


def test_who_waits_for_a_rank_behind_is_not_named() -> None:
    beats = signs(hosts=("a",) * 3)
    slots = {rank: replace(beat, phases=10 - rank) for rank, beat in beats.items()}
    assert ranks_behind(slots) == "rank 2 is alive but behind (last heartbeat: step 2)"
