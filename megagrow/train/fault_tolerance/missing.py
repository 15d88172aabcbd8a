"""Who is missing among the ranks, in words; on several hosts with the names of the hosts. Pure."""

from collections.abc import Sequence

from megagrow.train.fault_tolerance.heartbeat import Sign


def silent_ranks(
    signs: dict[int, Sign] | None, hosts: Sequence[str], rank: int, seconds: float
) -> str:
    """Who was not heard of for `seconds`, as `rank` reads the board; "" if nobody is missing.

    `signs` is None where the board gives no answer; `hosts` has the host of each rank. A host of
    which no rank gives a sign is named instead of its ranks.
    """
    several = len(set(hosts)) > 1
    if signs is None:
        dead = f"{_name(0, hosts)} gives no answer: it is frozen or dead"
        away = several and hosts[rank] != hosts[0]
        return f"{dead}, or {hosts[0]} or {hosts[rank]} is off the network" if away else dead
    silent = {rank: sign for rank, sign in signs.items() if sign.age > seconds}
    lost = [host for host in dict.fromkeys(hosts) if several and _ranks(host, hosts) <= {*silent}]
    said = [_lost_host(host, hosts, silent) for host in lost]
    rest = {rank: sign for rank, sign in silent.items() if not lost or hosts[rank] not in lost}
    return "; ".join([*said, *_told(rest, hosts, "gives no sign of life: it is frozen or dead")])


def ranks_behind(signs: dict[int, Sign] | None, hosts: Sequence[str]) -> str:
    """Who has come to fewer phases than the others; "" if nobody is behind."""
    known = signs or {}
    furthest = max((sign.phases for sign in known.values()), default=0)
    behind = {rank: sign for rank, sign in known.items() if sign.phases < furthest}
    return "; ".join(_told(behind, hosts, "is alive, but stays behind"))


def _told(signs: dict[int, Sign], hosts: Sequence[str], why: str) -> list[str]:
    return [f"{_name(r, hosts)} {why}, last heard of in {s.phase}" for r, s in signs.items()]


def _name(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} on {hosts[rank]}" if len(set(hosts)) > 1 else f"rank {rank}"


def _ranks(host: str, hosts: Sequence[str]) -> set[int]:
    return {rank for rank, there in enumerate(hosts) if there == host}


def _lost_host(host: str, hosts: Sequence[str], silent: dict[int, Sign]) -> str:
    ranks = sorted(_ranks(host, hosts))
    last = min((silent[rank] for rank in ranks), key=lambda sign: sign.age)
    which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return (
        f"host {host} ({which}) gives no sign of life: it is down or off the network, last heard "
        f"of in {last.phase}"
    )
