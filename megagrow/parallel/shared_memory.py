"""Memory shared by the ranks of one host.

gloo uses TCP even between processes of one host, several times slower than memory. Ranks of one
host therefore map the same memory. It is anonymous (memfd), so a killed rank leaves no files
behind.
"""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.agreement import run_on_all_ranks

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def on_one_host() -> bool:
    """Return True if all ranks run on CPUs of one host, in one process namespace. Collective."""
    if dist.get_backend() != "gloo":
        return False
    host = None
    if _BOOT_ID.exists():
        host = (_BOOT_ID.read_text(encoding="ascii"), _PID_NAMESPACE.stat().st_ino)
    hosts = [host] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    return host is not None and all(other == host for other in hosts)


def shared_zeros(own_bytes: int, owners: Iterable[int]) -> list[Tensor]:
    """Allocate zeros on every rank and map those of `owners`, (bytes,) uint8 each. Collective.

    Requires `on_one_host`. Memory is released when no rank holds a tensor of it.
    """
    own = run_on_all_ranks(lambda: _memory_file(own_bytes))
    try:
        handles: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(handles, (os.getpid(), own))
        # No rank closes its file before all have mapped it.
        return run_on_all_ranks(lambda: [_map(*handles[owner]) for owner in owners])
    finally:
        os.close(own)


def _memory_file(size: int) -> int:
    file = os.memfd_create("megagrow")
    os.ftruncate(file, size)
    return file


def _map(process: int, descriptor: int) -> Tensor:
    """Map a file that a process has open; the mapping is released with the tensor."""
    file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)
    finally:
        os.close(file)
