"""Process groups of commands that run a model without training it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megagrow.errors import ConfigError
from megagrow.parallel.launch import Launch, own_device, read_launch
from megagrow.parallel.process_groups import (
    Topology,
    init_process_group,
    leave_process_group,
    make_topology,
)
from megagrow.train.fault_tolerance.watchdog import watched_ranks


def init_topology(tp: int) -> Topology:
    """Initialize the process groups of all launched ranks with `tp` tensor-parallel ranks.

    Raises InputError if `tp` does not divide the world size.
    """
    launch = _launch_of(tp)
    if dist.is_initialized():
        return make_topology(tp, own_device(launch))
    return make_topology(tp, init_process_group(launch))


@contextmanager
def watched_topology(tp: int) -> Iterator[Topology]:
    """`init_topology` as a context that destroys the process groups it initialized.

    Within it, PeerLost is raised or the process ends with its exit code if another rank exits.
    """
    launch = _launch_of(tp)
    if dist.is_initialized():
        yield init_topology(tp)
        return
    with watched_ranks(launch, timeout=None) as (device, watchdog):
        watchdog.beat("evaluating")
        yield make_topology(tp, device)
        leave_process_group()


def _launch_of(tp: int) -> Launch:
    launch = read_launch()
    if launch.world_size % tp != 0:
        raise ConfigError(f"--tp {tp} does not divide the world size {launch.world_size}")
    return launch
