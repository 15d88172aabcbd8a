"""Pipeline schedules: the order of forward and backward passes on each pipeline rank. Pure.

One chunk per rank gives 1F1B (Narayanan et al. 2019), several give interleaved 1F1B (Narayanan et
al. 2021, section 2.2). One rank with one chunk is gradient accumulation.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple


class Pass(NamedTuple):
    """Forward or backward pass of one chunk of the model for one micro-batch."""

    is_forward: bool
    chunk: int
    """Index among the chunks of the model; chunk i belongs to rank i % ranks."""
    micro_batch: int


Timeline = tuple[tuple[Pass | None, ...], ...]
"""Passes of each rank by slot; None where the rank is idle. All rows have the same length."""


def rank_order(
    rank: int, ranks: int, chunks_per_rank: int, micro_batches: int, trains: bool
) -> list[Pass]:
    """Return the passes of a rank in order, without backward passes unless it `trains`.

    After the warm-up, forward and backward passes alternate. The warm-up of 1F1B is as short as
    possible, so that few micro-batches are in flight. That of interleaved 1F1B is Megatron-LM's:
    one more pass per following rank gives each transfer the time of a pass.
    """
    groups = _groups(ranks, micro_batches)
    own = range(rank, ranks * chunks_per_rank, ranks)
    forwards = [Pass(True, *each) for group in groups for each in product(own, group)]
    if not trains:
        return forwards
    backwards = [Pass(False, *each) for group in groups for each in product(own[::-1], group)]
    before = ranks - rank - 1
    if chunks_per_rank > 1:
        before = 2 * before + (chunks_per_rank - 1) * max(map(len, groups))
    before = min(before, len(forwards))
    order = forwards[:before]
    for forward, backward in zip(forwards[before:], backwards, strict=False):
        order += (forward, backward)
    return order + backwards[len(forwards) - before :]


def _groups(ranks: int, micro_batches: int) -> list[range]:
    """Return the micro-batches that pass one chunk of a rank after the other: groups of `ranks`,
    and a few more in some of them if `ranks` does not divide their number."""
    count = max(1, micro_batches // ranks)
    ends = [(index + 1) * micro_batches // count for index in range(count)]
    return [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


@lru_cache(maxsize=16)
def timeline(ranks: int, chunks_per_rank: int, micro_batches: int, trains: bool = True) -> Timeline:
    """Return the passes of all ranks by slot, each in the first slot after the passes it needs.

    Results are sent at the end of their slot. In this order every transfer has its sender and its
    receiver in the same slot, and a pass needs only transfers of earlier slots: no rank ever waits
    for one that waits for it.
    """
    orders = [rank_order(r, ranks, chunks_per_rank, micro_batches, trains) for r in range(ranks)]
    last = ranks * chunks_per_rank - 1
    rows: list[list[Pass | None]] = [[] for _ in orders]
    done: set[Pass | None] = {None}
    position = [0] * ranks
    while any(at < len(order) for at, order in zip(position, orders, strict=True)):
        now = []
        for rank, order in enumerate(orders):
            each = order[position[rank]] if position[rank] < len(order) else None
            if each is not None and needed(each, last) not in done:
                each = None
            rows[rank].append(each)
            if each is not None:
                position[rank] += 1
                now.append(each)
        if not now:
            raise AssertionError("the schedule has a cycle")
        done.update(now)
    return tuple(map(tuple, rows))


def needed(each: Pass, last: int) -> Pass | None:
    """Return the pass of another chunk, or of the last one, whose result a pass reads.

    Args:
        each: the pass.
        last: index of the last chunk.
    """
    if each.is_forward:
        return None if each.chunk == 0 else each._replace(chunk=each.chunk - 1)
    if each.chunk == last:
        return each._replace(is_forward=True)
    return each._replace(chunk=each.chunk + 1)
