"""Launcher environment: ranks, devices, rendezvous stores and process settings.

Only this module reads and sets environment variables.
"""

import atexit
import gc
import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megagrow.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """What the launcher (deepspeed, torchrun, or nobody) says of this process."""

    rank: int
    world_size: int
    local_rank: int


def read_launch() -> Launch:
    """The launcher's rank variables; a process started without a launcher is a world of one."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    given = {name: os.environ[name] for name in alone if name in os.environ}
    if given and len(given) < len(alone):
        missing = ", ".join(alone.keys() - given.keys())
        raise ConfigError(f"the launcher set {', '.join(given)} but not {missing}")
    return Launch(*map(int, (alone | given).values()))


def launcher_kills_all_ranks() -> bool:
    """Whether the launcher ends all ranks as soon as one has failed: torchrun and deepspeed do."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


SHARED_VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_", "DS_", "CUBLAS_", "OMP_")
"""How the names of variables begin that decide how ranks compute and talk to each other."""


OWN_VARIABLES = ("NCCL_IB_HCA", "NCCL_HOSTID", "TRITON_CACHE_DIR")
"""Those among them that hosts may well set each for itself, as all that end in _IFNAME."""


def shared_variables() -> dict[str, str]:
    """Environment variables of this process that should have one value on all ranks."""
    names = [name for name in os.environ if name.startswith(SHARED_VARIABLES)]
    names += [name for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE") if name in os.environ]
    own = {name for name in names if name in OWN_VARIABLES or name.endswith("_IFNAME")}
    return {name: os.environ[name] for name in sorted({*names} - own)}


def choose_accelerator() -> None:
    """Tells DeepSpeed what to run on. It asks when it is imported, and warns if nobody says."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def tune_process() -> None:
    """Call once, when everything is imported and no large tensor has been made.

    On CPUs most of a growth is the first touch of new memory. torch asks for huge pages (2 MiB
    instead of 4 KiB, so 512 times fewer faults) only if this variable is set before its first
    large tensor. And what the imports made is never garbage: without it a collection takes
    milliseconds. torch itself imports its compiler, half of all objects, only in the first step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else nanobind calls what triton has made leaks


def export_local_rank(launch: Launch) -> None:
    """Set LOCAL_RANK for DeepSpeed, which reads it even without a launcher."""
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))


def own_device(launch: Launch) -> torch.device:
    """What a rank computes on: a GPU of its own where there are any."""
    if torch.cuda.is_available():
        return torch.device("cuda", launch.local_rank)
    return torch.device("cpu")


def first_host() -> str:
    """Where rank 0 runs, as the launcher says."""
    return os.environ.get("MASTER_ADDR", "localhost")


def rendezvous_store(launch: Launch, timeout: timedelta) -> Any:
    """The store through which the ranks find each other, when all of them have come."""
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    meetings = rendezvous("env://", launch.rank, launch.world_size, timeout=timeout)
    store, *_ = next(meetings)
    store.set_timeout(timeout)
    return _own_part(store)


def open_store(launch: Launch, timeout: timedelta) -> Any:
    """The same store, which waits for nobody but whoever keeps it: rank 0, or torchrun.

    RuntimeError where that one does not answer in time.
    """
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    port = os.environ.get("MASTER_PORT")
    if port is None:
        raise ConfigError("the launcher did not set MASTER_PORT")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host_name=first_host(),
        port=int(port),
        world_size=launch.world_size,
        is_master=launch.rank == 0 and not kept,
        timeout=timeout,
        wait_for_workers=False,
    )
    return _own_part(store)


def _own_part(store: Any) -> Any:
    """Ranks that torchrun has started again get the store of those before them: without a part of
    their own in it they would wait for the addresses of the dead."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start-{start}", store)  # type: ignore[attr-defined]
