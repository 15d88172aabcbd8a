"""How buffers of numbers get from rank to rank: through the network, or through shared memory.

gloo sends through TCP even between processes of one machine, which costs several times what
memory does. Ranks of one machine therefore write into memory that the others can read.
"""

import mmap
import os
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = Path("/proc/self/ns/pid")


class Carrier(Protocol):
    """Carries one round after the other; all ranks together. Boxes are 1-D fp32, one per rank."""

    num_buffers: int
    """How many rounds are in memory at once."""

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        """Empty buffers of these numbers of elements, to be filled for each rank."""

    def all_to_all(self, sizes: list[int]) -> list[Tensor]:
        """Sends the buffers; returns those that came, of these sizes, valid until the next call."""


class Network:
    """The process group's all-to-all: nccl between GPUs, gloo between machines."""

    num_buffers = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        self._sizes = sizes
        self._outbox = torch.empty(sum(sizes), device=self._device)
        return list(self._outbox.split(sizes))

    def all_to_all(self, sizes: list[int]) -> list[Tensor]:
        inbox = torch.empty(sum(sizes), device=self._device)
        dist.all_to_all_single(inbox, self._outbox, sizes, self._sizes)
        return list(inbox.split(sizes))


class SharedMemory:
    """Memory of each rank that all ranks of the machine map.

    It has no name in any file system, so that nothing is left when a rank is killed. Two rounds
    fit in: while a rank fills one the others may still read the one before, so that one barrier a
    round is enough.
    """

    num_buffers = 2

    def __init__(self, largest: int) -> None:
        """`largest` is the number of elements that this rank sends in a round at most."""
        self._rank, self._world, self._largest = dist.get_rank(), dist.get_world_size(), largest
        self._rounds = 0
        own = os.memfd_create("megagrow")
        try:
            os.ftruncate(own, self._table_bytes + 2 * 4 * largest)
            everyone: list[tuple[int, int]] = [(0, 0)] * self._world
            dist.all_gather_object(everyone, (os.getpid(), own))
            self._memory = [_map(f"/proc/{process}/fd/{file}") for process, file in everyone]
            dist.barrier()  # no rank closes its file before all have opened it
        finally:
            os.close(own)

    @property
    def _table_bytes(self) -> int:
        # For either round and each rank the element at which its buffer begins.
        return 2 * 8 * self._world

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        turn = self._rounds % 2
        first = turn * self._largest
        ends = torch.tensor([0, *sizes]).cumsum(0) + first
        self._table(self._rank)[turn] = ends[:-1]
        return list(self._elements(self._rank)[first : int(ends[-1])].split(sizes))

    def all_to_all(self, sizes: list[int]) -> list[Tensor]:
        dist.barrier()
        turn = self._rounds % 2
        self._rounds += 1
        starts = [int(self._table(peer)[turn, self._rank]) for peer in range(self._world)]
        return [
            self._elements(peer)[start : start + size]
            for peer, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ]

    def _table(self, rank: int) -> Tensor:
        return self._memory[rank][: self._table_bytes].view(torch.int64).view(2, self._world)

    def _elements(self, rank: int) -> Tensor:
        return self._memory[rank][self._table_bytes :].view(torch.float32)


def group_device() -> torch.device:
    """Where tensors have to be that the process group sends."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def on_one_host() -> bool:
    """Whether all ranks compute on CPUs of one machine and see each other's processes."""
    here = None
    if dist.get_backend() == "gloo" and _BOOT.exists():
        here = (_BOOT.read_text(encoding="ascii"), _PROCESSES.stat().st_ino)
    everyone = [here] * dist.get_world_size()
    dist.all_gather_object(everyone, here)
    return here is not None and all(there == here for there in everyone)


def _map(path: str) -> Tensor:
    """A file as a tensor of bytes; the memory is given back with the tensor."""
    file = os.open(path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)
    finally:
        os.close(file)
