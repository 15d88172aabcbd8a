"""Names of missing ranks: ranks on one host, and hosts where there are several."""

import pytest

from megagrow.train.fault_tolerance.heartbeat import RankHeartbeat, ranks_behind, silent_ranks

SECONDS = 2.0
HOSTS = ("a", "a", "b", "b", "c")


def signs(*silent: int, behind: tuple[int, ...] = ()) -> dict[int, RankHeartbeat]:
    """Those of five ranks, of which some were last heard of some time ago, in other steps."""
    return {
        rank: RankHeartbeat(
            phases=3 if rank in behind else 4,
            phase=f"step {rank}",
            age=10.0 - rank if rank in silent else 0.5,
        )
        for rank in range(len(HOSTS))
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
    assert silent_ranks(signs(*silent), HOSTS, 0, SECONDS) == words


@pytest.mark.parametrize("hosts", [(), ("a",) * 5])
def test_on_one_host_ranks_are_named(hosts: tuple[str, ...]) -> None:
    assert silent_ranks(signs(2, 3), hosts, 0, SECONDS) == (
        "rank 2 is unresponsive (last heartbeat: step 2); "
        "rank 3 is unresponsive (last heartbeat: step 3)"
    )
    silent = "rank 0 does not answer"
    assert silent_ranks(None, hosts, 4, SECONDS) == silent


def test_a_rank_without_an_answer_may_be_off_the_network_itself() -> None:
    said = "rank 0 on a does not answer"
    assert silent_ranks(None, HOSTS, 1, SECONDS) == said
    assert silent_ranks(None, HOSTS, 3, SECONDS) == (
        f"{said}: frozen or dead, or a or b is off the network"
    )


def test_who_is_behind() -> None:
    assert ranks_behind(signs(behind=(4,)), HOSTS) == (
        "rank 4 on c is alive but behind (last heartbeat: step 4)"
    )
    assert ranks_behind(signs(), HOSTS) == ranks_behind(None, HOSTS) == ""
