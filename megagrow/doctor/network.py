"""Network measurements: collectives over all ranks, and pairwise exchanges between hosts.

A collective is as fast as its slowest rank and does not identify it. Hosts therefore also exchange
data in pairs, all pairs at once, over several rounds: a host that is slow with all its partners is
slow itself.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

ROUNDS = 4
"""Maximum number of pairwise rounds; a host needs only one partner that is not slow."""

REPEATS = 3
"""Number of measurements; the fastest is used because interference only adds time."""


@dataclass(frozen=True)
class Speeds:
    """Measurements of one rank in bytes per second. Sizes are bytes per rank."""

    all_reduce: dict[int, float]
    """By size: bus bandwidth, the rate of a ring over each link (`busbw` of nccl-tests)."""
    all_to_all: dict[int, float]
    """By size: rate at which each rank sends to the others."""
    hosts: tuple[float, ...]
    """By round: rate at which this rank sent to its partner while receiving as much.

    Rounds without a partner are omitted.
    """


def sizes_for(device: torch.device) -> tuple[int, ...]:
    """Return three message sizes in bytes: latency-bound, intermediate and bandwidth-bound."""
    return (2**20, 2**24, 2**27) if device.type == "cuda" else (2**16, 2**20, 2**23)


def measure_speeds(
    device: torch.device, hosts: Sequence[Sequence[int]], sizes: Sequence[int]
) -> Speeds:
    """Measure all speeds. Collective. `hosts` lists the ranks of each host, `sizes` are bytes."""
    world = dist.get_world_size()
    all_reduce, all_to_all = {}, {}
    for size in sizes:
        numbers = torch.ones(size // 4 // world * world, device=device)
        out = torch.empty_like(numbers)
        share = (world - 1) / world * numbers.nbytes

        reduce_all = partial(dist.all_reduce, numbers, op=dist.ReduceOp.MAX)
        all_reduce[size] = 2 * share / _seconds(reduce_all, device)
        exchange_all = partial(dist.all_to_all_single, out, numbers)
        all_to_all[size] = share / _seconds(exchange_all, device)
    return Speeds(all_reduce, all_to_all, _measure_pairs(device, hosts, max(sizes)))


def round_robin_pairs(count: int, rounds: int) -> list[dict[int, int]]:
    """Return rounds of pairs of `count` hosts (circle method), each as a map host -> partner.

    In each round a host has a new partner, or none. There are at most `rounds` rounds, and no more
    than needed to cover every pair.
    """
    circle = list(range(count + count % 2))  # an odd count is padded with a host that is dropped
    result = []
    for _ in range(min(rounds, len(circle) - 1)):
        pairs = [(circle[at], circle[-1 - at]) for at in range(len(circle) // 2)]
        partners = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        result.append({a: b for a, b in partners.items() if max(a, b) < count})
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return result


def _measure_pairs(
    device: torch.device, hosts: Sequence[Sequence[int]], size: int
) -> tuple[float, ...]:
    """Measure exchanges of each rank with the rank of the same index on its host's partner."""
    rank, world, speeds = dist.get_rank(), dist.get_world_size(), []
    own_host = next(index for index, ranks in enumerate(hosts) if rank in ranks)
    local_index = list(hosts[own_host]).index(rank)
    for partners in round_robin_pairs(len(hosts), ROUNDS):
        counts = [0] * world
        others = hosts[partners[own_host]] if own_host in partners else ()
        if local_index < len(others):  # hosts may have different numbers of ranks
            counts[others[local_index]] = size // 4
        numbers = torch.ones(sum(counts), device=device)
        exchange = partial(
            dist.all_to_all_single, torch.empty_like(numbers), numbers, counts, counts
        )
        seconds = _seconds(exchange, device)
        if numbers.numel():
            speeds.append(numbers.nbytes / seconds)
    return tuple(speeds)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of `REPEATS` times, after one run that establishes connections."""
    action()
    best = float("inf")
    for _ in range(REPEATS):
        _synchronize(device)
        dist.barrier()
        begin = time.perf_counter()
        action()
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
