"""Traffic of a growth in bytes, computed from the plans of ranks before any tensor exists."""

from dataclasses import dataclass

from megagrow.growth.map import GrowthMap
from megagrow.reshard.dense import dense_bytes
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import Transfer, plan_rank

FP32_BYTES = 4

SAMPLED_RANKS = 16
"""Ranks whose plans represent those of a larger world in `total_volume`."""

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Volume:
    """Bytes of fp32 weights and moments moved by one rank."""

    sent: dict[int, int]
    """Bytes by destination rank."""
    received: dict[int, int]
    """Bytes by source rank."""
    kept: int
    """Bytes copied within this rank (`TransferStats.bytes_local`)."""
    between_pipeline_ranks: int
    """Bytes sent to other pipeline ranks (`TransferStats.bytes_between_pipeline_ranks`)."""
    reduced: int
    """Bytes this rank sends in the all-reduces of dense terms."""

    @property
    def bytes_sent(self) -> int:
        """Total bytes sent by this rank (`TransferStats.bytes_sent`)."""
        return sum(self.sent.values()) + self.reduced


def rank_volume(rank: int, source: Layout, growth: GrowthMap, target: Layout) -> Volume:
    """Return the bytes `rank` sends, receives and keeps when `growth` maps `source` to `target`.

    The cost is proportional to the rank's own copies, independent of the number of ranks.
    """
    plan = plan_rank(rank, source, growth, target)
    reduced = dense_bytes(source, growth, target)
    away = FP32_BYTES * plan.numel_between_pipeline_ranks(target)
    return Volume(
        {peer: _bytes(transfers) for peer, transfers in sorted(plan.outgoing.items())},
        {peer: _bytes(transfers) for peer, transfers in sorted(plan.incoming.items())},
        FP32_BYTES * plan.numel_local,
        away + (reduced if target.pp > 1 else 0),
        reduced,
    )


@dataclass(frozen=True)
class TotalVolume:
    """Bytes of fp32 weights and moments that all ranks send to other ranks in a growth."""

    between_ranks: int
    between_pipeline_ranks: int
    """Those to other pipeline ranks of the target."""
    is_exact: bool
    """False if it is an estimate from `SAMPLED_RANKS` ranks."""


def total_volume(source: Layout, growth: GrowthMap, target: Layout) -> TotalVolume:
    """Return the bytes between ranks when `growth` maps `source` to `target`.

    A world above `SAMPLED_RANKS` is estimated from that many ranks. Their distances are multiples
    of the golden ratio, so that they have different data-, tensor- and pipeline-parallel ranks.
    """
    world = target.world_size
    count = min(world, SAMPLED_RANKS)
    steps = range(count)
    ranks = steps if world == count else [int(world * (GOLDEN_RATIO * step % 1)) for step in steps]
    volumes = [rank_volume(rank, source, growth, target) for rank in ranks]
    sent = sum(volume.bytes_sent for volume in volumes)
    away = sum(volume.between_pipeline_ranks for volume in volumes)
    return TotalVolume(sent * world // count, away * world // count, world == count)


def _bytes(transfers: list[Transfer]) -> int:
    return FP32_BYTES * sum(transfer.numel for transfer in transfers)
