"""Memory shared by the ranks of one host.

gloo uses TCP even between processes of one host, several times slower than memory. Ranks of one
host therefore map the same memory. It is anonymous (memfd), so a killed rank leaves no files
behind.
"""

import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
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
    return _shared(lambda file: os.ftruncate(file, own_bytes), owners)


def shared_copies(parts: Iterable[Tensor], owners: Iterable[int]) -> list[Tensor]:
    """Copy 1-D tensors to shared memory and map that of `owners`. Collective.

    As `shared_zeros`, with the bytes of this rank's `parts` in order. They are written to the file:
    this takes half the time of writes to a mapping, since the kernel neither clears new memory nor
    faults on every page.
    """
    return _shared(lambda file: _write(file, parts), owners)


def _shared(fill: Callable[[int], None], owners: Iterable[int]) -> list[Tensor]:
    """Create and fill a memory file on every rank; map those of `owners`. Collective."""
    own = run_on_all_ranks(lambda: os.memfd_create("megagrow"))
    try:
        run_on_all_ranks(lambda: fill(own))
        handles: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(handles, (os.getpid(), own))
        # No rank closes its file before all have mapped it.
        return run_on_all_ranks(lambda: [_map(*handles[owner]) for owner in owners])
    finally:
        os.close(own)


def _write(file: int, parts: Iterable[Tensor]) -> None:
    for part in parts:
        data = part.view(torch.uint8).numpy().data
        while data:
            data = data[os.write(file, data) :]


def _map(process: int, descriptor: int) -> Tensor:
    """Map a file that a process has open; the mapping is released with the tensor."""
    file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    try:
        if os.fstat(file).st_size == 0:  # cannot be mapped
            return torch.empty(0, dtype=torch.uint8)
        memory = mmap.mmap(file, 0)
    finally:
        os.close(file)
    with suppress(AttributeError, OSError):  # not Linux, or without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
