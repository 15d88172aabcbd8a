"""Traffic of a growth in bytes, computed from one rank's plan before any tensor exists."""

from dataclasses import dataclass

from megagrow.growth.map import GrowthMap
from megagrow.reshard.dense import dense_bytes
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import Transfer, plan_rank

FP32_BYTES = 4


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


def _bytes(transfers: list[Transfer]) -> int:
    return FP32_BYTES * sum(transfer.numel for transfer in transfers)
