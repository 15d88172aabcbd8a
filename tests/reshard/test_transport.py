"""Shared memory between ranks: what is sent arrives, and nothing is left behind."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.parallel.shared_memory import on_one_host
from megagrow.reshard.transport import SharedMemory
from tests.helpers.spawn import run_ranks

WORLD = 3


def sizes(sender: int, step: int) -> list[int]:
    """Elements that a rank sends to each; some boxes are empty, and rounds differ."""
    return [(sender + 2 * receiver + step) % 4 * 5 for receiver in range(WORLD)]


def contents(sender: int, receiver: int, step: int) -> torch.Tensor:
    first = 10_000 * sender + 1_000 * receiver + 100 * step
    return torch.arange(first, first + sizes(sender, step)[receiver]).float()


def shared_memory_in_use() -> tuple[int, int]:
    """Open files of that kind, and mappings."""
    files = [os.readlink(f"/proc/self/fd/{file.name}") for file in Path("/proc/self/fd").iterdir()
             if os.path.islink(f"/proc/self/fd/{file.name}")]  # fmt: skip
    maps = Path("/proc/self/maps").read_text()
    return sum("memfd:megagrow" in file for file in files), maps.count("memfd:megagrow")


def carried() -> tuple[bool, bool, tuple[int, int], tuple[int, int]]:
    """Return if the ranks found each other, whether all arrived; use of memory during and after."""
    rank, right = dist.get_rank(), True
    carrier = SharedMemory(max(sum(sizes(rank, step)) for step in range(4)))
    for step in range(6):
        for receiver, box in enumerate(carrier.buffers(sizes(rank, step % 4))):
            box.copy_(contents(rank, receiver, step % 4))
        coming = [sizes(sender, step % 4)[rank] for sender in range(WORLD)]
        for sender, box in enumerate(carrier.all_to_all(coming)):
            right &= torch.equal(box, contents(sender, rank, step % 4))
    during = shared_memory_in_use()
    del carrier, box
    return on_one_host(), right, during, shared_memory_in_use()


@pytest.mark.dist
def test_boxes_arrive_round_after_round_and_nothing_is_left():
    before = set(os.listdir("/dev/shm"))
    for found, right, during, after in run_ranks(WORLD, carried):
        assert found and right
        assert during == (WORLD, WORLD), "every rank's memory is mapped"
        assert after == (0, 0)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "megagrow" in name]
