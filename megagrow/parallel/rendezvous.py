"""Rendezvous store: opened by all ranks, and waited for, before there is a process group."""

import resource
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megagrow.errors import ConfigError, PeerLost, ResourceError
from megagrow.parallel.launch import Launch, first_host, variable

CONNECT_SECONDS = 3.0
"""Timeout of one attempt to connect to the rendezvous store."""
MOST_FILES = 65536
"""Highest limit of open files that a rank sets."""


def rendezvous_store(launch: Launch, timeout: timedelta) -> Any:
    """Return the rendezvous store once all ranks have joined."""
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    store, *_ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    store.set_timeout(timeout)
    return _store_of_this_start(store)


def open_store(launch: Launch, timeout: timedelta) -> Any:
    """Open the rendezvous store without waiting for other ranks.

    Only the store's host (rank 0 or torchrun) must respond; raises RuntimeError after `timeout`.
    """
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    port = variable("MASTER_PORT")
    if port is None:
        raise ConfigError("the launcher did not set MASTER_PORT; set it to a free port of rank 0")
    hosted_by_agent = variable("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host_name=first_host(),
        port=int(port),
        world_size=launch.world_size,
        is_master=launch.rank == 0 and not hosted_by_agent,
        timeout=timeout,
        wait_for_workers=False,
    )
    return _store_of_this_start(store)


def join_store(launch: Launch, timeout: timedelta) -> Any:
    """Open the rendezvous store, waiting up to `timeout` for its host.

    Also raises the limit of open files. Raises PeerLost if the host does not respond, ResourceError
    if rank 0 cannot listen.
    """
    _raise_file_limit()
    where = f"{first_host()}:{variable('MASTER_PORT')}"
    try:
        if launch.rank > 0:
            _wait_for_port(timeout)
        return open_store(launch, timeout)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        if launch.rank == 0:
            raise ResourceError(
                f"rank 0 cannot open the rendezvous store at {where} ({reason}); set MASTER_PORT "
                "to a free port"
            ) from error
        raise PeerLost(
            f"rank 0 did not open the rendezvous store at {where} within "
            f"{timeout.total_seconds():.0f} s, or was lost ({reason})",
            is_reporter=launch.local_rank == 0 or launch.rank == 1,
        ) from error


def _raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit, at most to MOST_FILES.

    Rank 0 has two connections with every rank, to the store and to the heartbeat server; a login
    shell usually allows 1,024 open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _wait_for_port(timeout: timedelta) -> None:
    """Wait for the port of the store; at a timeout torch would print stack traces."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            address = (first_host(), int(variable("MASTER_PORT") or 0))
            socket.create_connection(address, CONNECT_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(CONNECT_SECONDS / 10)


def wait_for_ranks(launch: Launch, store: Any, timeout: timedelta) -> None:
    """Wait until all ranks have opened the store. Collective.

    Raises PeerLost with the ranks that have not after `timeout`.
    """
    if launch.world_size == 1:
        return
    keys = [f"joined/{rank}" for rank in range(launch.world_size)]
    store.set(keys[launch.rank], "")
    try:
        if launch.rank == 0:
            store.wait(keys, timeout)
            store.set("joined/all", "")
        else:
            store.wait(["joined/all"], timeout)
    except dist.DistStoreError as error:
        joined = [store.check([key]) for key in keys]
        missing = [str(rank) for rank, present in enumerate(joined) if not present]
        raise PeerLost(
            f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(missing[:8])}"
            f"{' and others' if len(missing) > 8 else ''} did not join within "
            f"{timeout.total_seconds():.0f} s; {sum(joined)} of {launch.world_size} ranks have "
            "joined",
            is_reporter=launch.rank == joined.index(True),
        ) from error


def _store_of_this_start(store: Any) -> Any:
    """Prefix a store with torchrun's restart count.

    Restarted ranks get the store of the previous start; without a prefix they would connect to
    the addresses of dead ranks and hang (torch 2.13).
    """
    start = variable("TORCHELASTIC_RESTART_COUNT") or "0"
    return dist.PrefixStore(f"start-{start}", store)  # type: ignore[attr-defined]
