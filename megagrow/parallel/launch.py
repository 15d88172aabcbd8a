"""Launcher environment: ranks, devices, addresses and process settings.

Only this module reads and sets environment variables. It imports torch where a device is needed, so
that the command line reports errors without it.
"""

import atexit
import gc
import importlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Launch:
    """Rank of this process, as set by the launcher (deepspeed, torchrun or none)."""

    rank: int
    world_size: int
    local_rank: int


def read_launch() -> Launch:
    """Return the launcher's rank variables; without a launcher, a world of size 1.

    Raises ConfigError if only some of RANK, WORLD_SIZE and LOCAL_RANK are set.
    """
    default = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    present = {name: os.environ[name] for name in default if name in os.environ}
    if present and len(present) < len(default):
        missing = ", ".join(default.keys() - present.keys())
        raise ConfigError(f"the launcher set {', '.join(present)} but not {missing}; set all three")
    return Launch(*map(int, (default | present).values()))


def launcher_kills_all_ranks() -> bool:
    """Return True if the launcher ends all ranks when one fails, as torchrun and deepspeed do."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


def record_failure(message: str) -> None:
    """Write a message to torchrun's error file, if torchrun started this process.

    torchrun ends with a traceback of its own. It then prints the message as the root cause, in the
    last lines. The format is that of `torch.distributed.elastic.multiprocessing.errors`, which is
    slow to import.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": details}}
        with suppress(OSError):  # the message has been printed
            Path(path).write_text(json.dumps(content), encoding="utf-8")


SHARED_VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_", "DS_", "CUBLAS_", "OMP_")
"""Prefixes of environment variables that affect computation and communication."""


OWN_VARIABLES = ("NCCL_IB_HCA", "NCCL_HOSTID", "TRITON_CACHE_DIR")
"""Exceptions that may differ between hosts, in addition to all that end in _IFNAME."""


def shared_variables() -> dict[str, str]:
    """Return the environment variables that should have the same value on all ranks."""
    names = [name for name in os.environ if name.startswith(SHARED_VARIABLES)]
    names += [name for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE") if name in os.environ]
    own = {name for name in names if name in OWN_VARIABLES or name.endswith("_IFNAME")}
    return {name: os.environ[name] for name in sorted({*names} - own)}


@contextmanager
def default_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set the environment variables that are not set, in a context."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def variable(name: str) -> str | None:
    """Return the value of an environment variable, None if it is not set."""
    return os.environ.get(name)


def cache_folder() -> Path:
    """Return the folder of files that are valid for all runs of a user; it may be missing."""
    default = Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "megagrow"


def choose_accelerator() -> None:
    """Set DeepSpeed's accelerator, which it reads on import and warns about if unset."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_gpu() else "cpu")


ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_expandable_segments() -> None:
    """Let torch's GPU allocator use expandable segments, unless the user has configured it.

    Memory of one size can then be reused for another, as when a growth replaces all tensors. torch
    reads the variable when it first allocates on a GPU.
    """
    if _has_gpu() and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def tune_process() -> None:
    """Set up memory and garbage collection; call once, before any large tensor exists.

    On CPUs, a growth spends most of its time on the first access to new memory. torch requests huge
    pages (2 MiB instead of 4 KiB, 512 times fewer faults) only if the variable is set before its
    first large tensor. Imported objects are never garbage: a collection without them takes only
    milliseconds. torch would import its compiler, half of all objects, only in the first step, so
    it is imported here.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    use_expandable_segments()
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise nanobind reports triton's objects as leaks


def export_launch(launch: Launch) -> None:
    """Set LOCAL_RANK, RANK and WORLD_SIZE unless set; DeepSpeed reads LOCAL_RANK in any case.

    All three are set because `read_launch` rejects a subset, so a second run in the same process
    would fail.
    """
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    os.environ.setdefault("RANK", str(launch.rank))
    os.environ.setdefault("WORLD_SIZE", str(launch.world_size))


def own_device(launch: Launch) -> "torch.device":
    """Return the device of a rank: its local GPU if there are GPUs, else the CPU."""
    import torch

    return torch.device("cuda", launch.local_rank) if _has_gpu() else torch.device("cpu")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def first_host() -> str:
    """Return the host of rank 0, as set by the launcher."""
    return os.environ.get("MASTER_ADDR", "localhost")


def listen_address(launch: Launch) -> str:
    """Return the IP address of rank 0 at which the other ranks reach it; call on rank 0.

    It is the loopback address if all ranks share a host, else an address of MASTER_ADDR, else that
    of the interface of the default route. "" (all interfaces) if there is none.
    """
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    if ranks_here == str(launch.world_size):
        return "127.0.0.1"
    try:
        entries = socket.getaddrinfo(first_host(), None, type=socket.SOCK_STREAM)
    except OSError:
        entries = []
    own = [str(entry[4][0]) for entry in entries if _is_own(str(entry[4][0]))]
    if own and (first_host() == "localhost" or first_host() in own):
        return own[0]
    # Some systems resolve their own host name to the loopback address.
    routable = [address for address in own if not ip_address(address).is_loopback]
    return routable[0] if routable else _default_route_address()


def _is_own(address: str) -> bool:
    """Return True if an IP address belongs to an interface of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _default_route_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation; nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])
