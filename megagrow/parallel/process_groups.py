"""Ranks, process groups and devices. A topology is passed as a value, never kept in a global.

world = data x context x pipeline x tensor parallel, in Megatron-LM's order of ranks: the
tensor-parallel rank changes fastest, then the context-, data- and pipeline-parallel rank. ZeRO
shards over data x context parallel ranks, so `dp` counts both (`with_context_parallel=True` in
Megatron-LM): dp_rank = batch_rank * cp + cp_rank, rank = (pp_rank * dp + dp_rank) * tp + tp_rank.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from megagrow.config.schema import ParallelConfig
from megagrow.parallel.launch import (
    Launch,
    export_launch,
    own_device,
    tune_process,
)
from megagrow.parallel.rendezvous import rendezvous_store

TIMEOUT = timedelta(minutes=30)


def init_process_group(
    launch: Launch, timeout: timedelta = TIMEOUT, store: Any = None
) -> torch.device:
    """Join all ranks (NCCL on GPUs, gloo on CPUs) and return this rank's device. Collective.

    Args:
        timeout: limit of a collective, also in the process groups of topologies.
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
    """Destroy all process groups after a barrier. Collective."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Topology:
    """Grid of the ranks of one stage, with this rank's process groups.

    Also serves as DeepSpeed's `mpu` object, with Megatron-LM's method names.
    """

    rank: int
    dp: int
    """Data x context parallel size: the ranks over which ZeRO shards."""
    tp: int
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    device: torch.device
    cp: int = 1
    pp: int = 1
    cp_group: dist.ProcessGroup | None = None
    """None if `cp` is 1."""
    pp_group: dist.ProcessGroup | None = None
    """None if `pp` is 1."""

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def batch_ranks(self) -> int:
        """Number of ranks that read different sequences."""
        return self.dp // self.cp

    @property
    def batch_rank(self) -> int:
        return self.dp_rank // self.cp

    @property
    def cp_rank(self) -> int:
        return self.dp_rank % self.cp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.dp * self.tp)

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

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


_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[range, dist.ProcessGroup]] = WeakKeyDictionary()
"""Process groups of topologies by their ranks, for each default process group."""


def make_topology(tp: int, device: torch.device, cp: int = 1, pp: int = 1) -> Topology:
    """Return the grid for tensor-, context- and pipeline-parallel sizes. Collective.

    A rank creates only the groups to which it belongs, at most four. Groups are reused: all ranks
    are the default process group, and later topologies of the same size create none. They exist
    until the default process group is destroyed. Until then torch would give a new group the name
    of a destroyed one with the same ranks, under which the store still has the addresses of that
    group, so creating it would hang.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    first, replica = rank - rank % tp, world // pp  # ranks of one pipeline rank
    tp_group = _group(range(first, first + tp), device)
    begin = rank - rank % replica
    dp_group = _group(range(begin + rank % tp, begin + replica, tp), device)
    cp_group = pp_group = None
    if cp > 1:
        begin = rank - rank % (cp * tp) + rank % tp
        cp_group = _group(range(begin, begin + cp * tp, tp), device)
    if pp > 1:
        pp_group = _group(range(rank % replica, world, replica), device)
        # NCCL creates a communicator in the first communication of a group, in which all of its
        # ranks must take part; the first transfers of a schedule have two. A barrier would choose
        # the GPU by the global rank.
        dist.all_reduce(torch.zeros(1, device=device), group=pp_group)
    dp = replica // tp
    return Topology(rank, dp, tp, dp_group, tp_group, device, cp, pp, cp_group, pp_group)


def stage_topology(parallel: ParallelConfig, device: torch.device) -> Topology:
    """Return the grid of a stage. Collective."""
    return make_topology(
        parallel.tensor_model_parallel_size,
        device,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )


def pipeline_rank_group(topology: Topology) -> dist.ProcessGroup:
    """Return the group of all ranks of this pipeline rank, data x context x tensor. Collective."""
    size = topology.dp * topology.tp
    first = topology.pp_rank * size
    return _group(range(first, first + size), topology.device)


def data_parallel_subgroup(topology: Topology, size: int) -> dist.ProcessGroup:
    """Return the group of this rank among `size` consecutive data-parallel ranks. Collective.

    It has equal tensor-parallel ranks, and is reused as in `make_topology`.
    """
    first = topology.dp_rank // size * size * topology.tp + topology.tp_rank
    return _group(range(first, first + size * topology.tp, topology.tp), topology.device)


def _group(ranks: range, device: torch.device) -> dist.ProcessGroup:
    """Return the process group of some ranks. Collective over these ranks."""
    default = dist.group.WORLD
    assert default is not None
    if len(ranks) == default.size():
        return default
    groups = _GROUPS.setdefault(default, {})
    if ranks not in groups:
        # By default a new group has torch's timeout, not that of the default process group.
        options = default._get_backend(device).options
        timeout = options._timeout if options else TIMEOUT  # the fake backend has no options
        groups[ranks] = dist.new_group([*ranks], timeout, use_local_synchronization=True)
    return groups[ranks]
