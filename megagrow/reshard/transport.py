"""Transports for reshard buffers: NCCL/gloo all-to-all, or shared memory on one host.

CPU ranks of one host write into memory that the other ranks map (`parallel.shared_memory`).
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.shared_memory import shared_zeros


class Transport(Protocol):
    """Exchange of one round at a time, collective. Buffers are 1-D fp32, one per rank."""

    num_buffers: int
    """Rounds held in memory at once."""

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        """Return uninitialized send buffers of these sizes in elements, one per rank."""

    def all_to_all(self, sizes: list[int]) -> list[Tensor]:
        """Send the buffers; return the received ones of these sizes, valid until the next call."""


class Network:
    """All-to-all of the process group: NCCL between GPUs, gloo between hosts."""

    num_buffers = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        self._sizes = sizes
        self._send = torch.empty(sum(sizes), device=self._device)
        return list(self._send.split(sizes))

    def all_to_all(self, sizes: list[int]) -> list[Tensor]:
        received = torch.empty(sum(sizes), device=self._device)
        dist.all_to_all_single(received, self._send, sizes, self._sizes)
        return list(received.split(sizes))


class SharedMemory:
    """Shared memory of each rank, mapped by all ranks of the host.

    It holds two rounds: while a rank writes one, the others can still read the previous one. One
    barrier per round is enough.
    """

    num_buffers = 2

    def __init__(self, largest: int) -> None:
        """Map the memory of all ranks; this rank sends at most `largest` elements per round."""
        self._rank, self._world, self._largest = dist.get_rank(), dist.get_world_size(), largest
        self._rounds = 0
        own_bytes = self._table_bytes + 2 * 4 * largest
        self._memory = shared_zeros(own_bytes, range(self._world))

    @property
    def _table_bytes(self) -> int:
        # Start element of each rank's buffer, for both rounds.
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
    """Return the device of tensors that the process group can send."""
    gpu = None if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    return gpu or torch.device("cpu")
