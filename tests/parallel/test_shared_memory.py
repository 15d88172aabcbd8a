"""Memory shared by the ranks of one host: values arrive, and nothing is left behind."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagrow.parallel.shared_memory import on_one_host, shared_copies, shared_zeros
from tests.helpers.spawn import run_ranks

WORLD = 3
NUMEL = 1000


def parts(rank: int) -> list[torch.Tensor]:
    """Tensors of several dtypes; the last rank has none."""
    values = torch.arange(10 * rank, 10 * rank + NUMEL)
    return [] if rank == WORLD - 1 else [values.float(), values[1:].bfloat16(), values[:0].float()]


def in_use() -> tuple[int, int]:
    """Open files of that kind, and mappings."""
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    maps = Path("/proc/self/maps").read_text()
    return sum("memfd:megagrow" in file for file in files), maps.count("memfd:megagrow")


def bytes_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=torch.uint8), *(t.view(torch.uint8) for t in tensors)])


def mapped() -> tuple[bool, bool, tuple[int, int], tuple[int, int]]:
    """Return if the ranks share a host and see all values; use of memory during and after."""
    rank = dist.get_rank()
    copies = shared_copies(parts(rank), range(WORLD))
    right = all(torch.equal(copies[peer], bytes_of(parts(peer))) for peer in range(WORLD))
    (zeros,) = shared_zeros(WORLD if rank == 0 else 0, [0])
    zeros[rank] = rank + 1
    dist.barrier()
    right &= zeros.tolist() == [1, 2, 3]
    during = in_use()
    del copies, zeros
    return on_one_host(), right, during, in_use()


@pytest.mark.dist
def test_all_ranks_see_what_each_writes_and_nothing_is_left() -> None:
    before = set(os.listdir("/dev/shm"))
    for together, right, during, after in run_ranks(WORLD, mapped):
        assert together and right
        assert during == (WORLD, WORLD), "memory of two ranks, and the zeros"
        assert after == (0, 0)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "megagrow" in name]
