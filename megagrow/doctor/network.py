"""How fast ranks talk: all together, and each host with others in turn.

A collective is as fast as its slowest rank, so it names nobody. In the rounds hosts exchange in
pairs, all pairs at once: who is slow with each of its partners is slow itself.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

ROUNDS = 4
"""Rounds of pairs at most: a host needs one partner that is not slow itself."""

REPEATS = 3
"""The best of so many counts: what disturbs a measurement makes it slower, never faster."""


@dataclass(frozen=True)
class Speeds:
    """Of one rank, in bytes per second. Sizes are bytes on each rank."""

    all_reduce: dict[int, float]
    """By size: the bus bandwidth, what a ring sends over each link (NCCL tests' `busbw`)."""
    all_to_all: dict[int, float]
    """By size: what each rank sends to others."""
    hosts: tuple[float, ...]
    """Round by round what this rank sent to its partner, while it received as much; rounds in which
    it rested are left out."""


def sizes_for(device: torch.device) -> tuple[int, ...]:
    """Sizes that show latency, what is between, and bandwidth."""
    return (2**20, 2**24, 2**27) if device.type == "cuda" else (2**16, 2**20, 2**23)


def measure_speeds(
    device: torch.device, hosts: Sequence[Sequence[int]], sizes: Sequence[int]
) -> Speeds:
    """Measures on all ranks together. `hosts`: the ranks of each host, in order."""
    world = dist.get_world_size()
    reduced, exchanged = {}, {}
    for size in sizes:
        numbers = torch.ones(size // 4 // world * world, device=device)
        out = torch.empty_like(numbers)
        share = (world - 1) / world * numbers.nbytes

        reduce_all = partial(dist.all_reduce, numbers, op=dist.ReduceOp.MAX)
        reduced[size] = 2 * share / _seconds(reduce_all, device)
        exchange_all = partial(dist.all_to_all_single, out, numbers)
        exchanged[size] = share / _seconds(exchange_all, device)
    return Speeds(reduced, exchanged, _between(device, hosts, max(sizes)))


def pairings(count: int, rounds: int) -> list[dict[int, int]]:
    """Rounds in which each of so many has another partner, or rests; by the circle method.

    At most `rounds`, and no more than it takes until everybody has met everybody.
    """
    circle = list(range(count + count % 2))  # with an odd number the partner of one is nobody
    found = []
    for _ in range(min(rounds, len(circle) - 1)):
        pairs = [(circle[at], circle[-1 - at]) for at in range(len(circle) // 2)]
        met = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        found.append({a: b for a, b in met.items() if max(a, b) < count})
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def _between(device: torch.device, hosts: Sequence[Sequence[int]], size: int) -> tuple[float, ...]:
    """Each rank exchanges with the one of its number on the partner of its host."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), []
    here = next(index for index, ranks in enumerate(hosts) if rank in ranks)
    place = list(hosts[here]).index(rank)
    for partners in pairings(len(hosts), ROUNDS):
        counts = [0] * world
        others = hosts[partners[here]] if here in partners else ()
        if place < len(others):  # else it rests, as hosts have different numbers of ranks
            counts[others[place]] = size // 4
        numbers = torch.ones(sum(counts), device=device)
        exchange = partial(
            dist.all_to_all_single, torch.empty_like(numbers), numbers, counts, counts
        )
        seconds = _seconds(exchange, device)
        if numbers.numel():
            found.append(numbers.nbytes / seconds)
    return tuple(found)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The shortest of some times; once before them, to make connections."""
    action()
    best = float("inf")
    for _ in range(REPEATS):
        _settle(device)
        dist.barrier()
        begin = time.perf_counter()
        action()
        _settle(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
