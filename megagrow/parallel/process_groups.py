"""Ranks, process groups and devices. Passed as a value, never kept in a global.

world = data parallel x tensor parallel, and tensor-parallel ranks are neighbors:
rank = dp_rank * tp + tp_rank.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megagrow.parallel.launch import (
    Launch,
    export_launch,
    own_device,
    rendezvous_store,
    tune_process,
)

TIMEOUT = timedelta(minutes=30)


def init_process_group(
    launch: Launch, timeout: timedelta = TIMEOUT, store: Any = None
) -> torch.device:
    """Join all ranks (NCCL on GPUs, gloo on CPUs) and return this rank's device. Collective.

    Args:
        timeout: limit of a collective, also in the process groups of `make_topology`.
        store: the rendezvous store; opened here if None.
    """
    tune_process()
    export_launch(launch)
    return join_ranks(launch, store or rendezvous_store(launch, timeout), timeout)


def join_ranks(launch: Launch, store: Any, timeout: timedelta) -> torch.device:
    """Create the default process group over `store` and return this rank's device. Collective."""
    device = own_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )
    return device


def leave_process_group() -> None:
    """Destroy the default process group after a barrier. Collective."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Topology:
    """Grid of the ranks of one stage, with this rank's process groups.

    Also serves as DeepSpeed's `mpu` object, with Megatron-LM's method names.
    """

    rank: int
    dp: int
    tp: int
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    device: torch.device

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_group


def make_topology(tp: int, device: torch.device) -> Topology:
    """Create the grid for a tensor-parallel size. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dp = world // tp
    # By default a new group has torch's timeout, not that of the default process group.
    assert dist.group.WORLD is not None
    timeout = dist.group.WORLD._get_backend(device).options._timeout
    tp_groups = [dist.new_group([d * tp + t for t in range(tp)], timeout) for d in range(dp)]
    dp_groups = [dist.new_group([d * tp + t for d in range(dp)], timeout) for t in range(tp)]
    return Topology(rank, dp, tp, dp_groups[rank % tp], tp_groups[rank // tp], device)


def destroy_topology(topology: Topology) -> None:
    """Destroy the two process groups of a grid."""
    dist.destroy_process_group(topology.tp_group)
    dist.destroy_process_group(topology.dp_group)
