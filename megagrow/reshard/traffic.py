"""How much a growth moves, seen from one rank, before there is a tensor: from its plan alone."""

from dataclasses import dataclass

from megagrow.growth.map import GrowthMap
from megagrow.reshard.dense import dense_bytes
from megagrow.reshard.layout import Layout
from megagrow.reshard.transfers import Transfer, plan_rank

FP32_BYTES = 4


@dataclass(frozen=True)
class Volume:
    """Bytes of fp32 weights and moments."""

    sent: dict[int, int]
    """By the rank that they go to."""
    received: dict[int, int]
    """By the rank that they come from."""
    kept: int
    """What this rank's target takes from this rank's source (`Moved.bytes_local`)."""
    reduced: int
    """What this rank sends so that matrices which are mixed as a whole come to all ranks."""

    @property
    def bytes_sent(self) -> int:
        """All that leaves this rank (`Moved.bytes_sent`)."""
        return sum(self.sent.values()) + self.reduced


def rank_volume(rank: int, source: Layout, growth: GrowthMap, target: Layout) -> Volume:
    """What `rank` sends, receives and keeps when `growth` leads from one layout to the other.

    Its cost is that of the rank's own copies, whatever the number of ranks.
    """
    plan = plan_rank(rank, source, growth, target)
    kept = sum(copy.shape[0] * copy.shape[1] for copy in plan.local)
    return Volume(
        {peer: _bytes(parcels) for peer, parcels in sorted(plan.outgoing.items())},
        {peer: _bytes(parcels) for peer, parcels in sorted(plan.incoming.items())},
        FP32_BYTES * kept,
        dense_bytes(source, growth, target),
    )


def _bytes(parcels: list[Transfer]) -> int:
    return FP32_BYTES * sum(len(parcel.rows) * len(parcel.cols) for parcel in parcels)
